"""Asking: one row with one seed, put to the model; what it says is kept, so that it is not asked twice."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from personaplug.encoders.encoded_sample import EncodedSample, samples_fingerprint
from personaplug.evaluation.controls import MeanPersona, RandomVectors
from personaplug.evaluation.lora_predictions import Ask, LoraPredictor
from personaplug.evaluation.model_inputs import Showing
from personaplug.evaluation.predictions import Answers, answer, keep, kept, reference_nll
from personaplug.llm.base import GenerationConfig
from personaplug.methods import Condition
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer, SoftPrompter
from personaplug.run import Models, Run

logger = logging.getLogger(__name__)


class Asking:
    """One row with one seed, ready to be asked.

    Attributes:
        shown: its samples, as the row shows them.
        matrices: what the row puts into the model; None for most.
    """

    def __init__(
        self,
        run: Run,
        models: Models,
        *,
        showing: Showing,
        condition: Condition,
        seed: int,
        decoding: str,
        generation: GenerationConfig,
        path: Path,
    ) -> None:
        """Show the row its samples.

        Args:
            decoding: "score" or "generate", see `answer`.
            path: of the file of answers.
        Raises:
            MissingData: if something that the row needs is not trained.
        """
        for trained in condition.needs:
            run.check_trained(trained.name, seed=seed)
        self.run, self.models, self.table, self.config = run, models, showing.table, showing.config
        self.condition, self.seed, self.path = condition, seed, path
        self.decoding, self.generation = decoding, generation
        self.shown = showing.show(condition, seed=seed)
        self.matrices = self._matrices(showing)
        self.depends_on = self._depends_on()

    @property
    def few(self) -> int:
        """Up to how many items the row's plug serves users with what is common to all."""
        return 0 if self._plug is None else self._plug.cold_start.max_items

    def answers(self) -> Answers:
        """What the model answers, or answered before."""
        made = kept(self.path, depends_on=self.depends_on)
        if made is None:
            made = self._through(self._answer)
            keep(made, self.path, depends_on=self.depends_on)
        return made

    def with_surprises(self, made: Answers) -> Answers:
        """Written answers with how likely the right ones were: another pass, made when the answers are safe.

        What keeps it from being made costs the row that column and nothing else.
        """
        if self.decoding == "score" or made.reference_nll is not None:
            return made
        try:
            told = self._through(self._surprise)
        except (IndexError, RuntimeError) as error:  # a right answer beyond the model's longest, or the memory
            logger.warning("%s: no likelihood of the right answers (%s)", self.condition.name, type(error).__name__)
            return made
        made = replace(made, reference_nll=told.reference_nll)
        keep(made, self.path, depends_on=self.depends_on)
        return made

    def _answer(self, samples: Sequence[EncodedSample], title: str) -> Answers:
        return answer(
            self.models.llm,
            samples,
            prompter=self._prompter,
            task=self.run.task,
            decoding=self.decoding,
            generation=self.generation,
            batch_size=self.config.evaluation_batch_size,
            title=title,
        )

    def _surprise(self, samples: Sequence[EncodedSample], title: str) -> Answers:
        """No answers, but how likely the right ones were."""
        found = reference_nll(
            self.models.llm,
            samples,
            prompter=self._prompter,
            batch_size=self.config.evaluation_batch_size,
            title=f"{title}, likelihood",
        )
        return Answers([""] * len(samples), [False] * len(samples), 0.0, 0, reference_nll=found)

    def _through(self, ask: Ask) -> Answers:
        """What the model says when asked, with the matrices in it that the row has."""
        condition, shown = self.condition, self.shown
        title = f"{condition.name} (seed {self.seed})" if condition.seeded else condition.name
        if self.matrices is None:
            return ask(shown.samples, title)
        return self.matrices.answers(shown.samples, shown.lenders, ask=ask, per_user=condition.per_user, title=title)

    @cached_property
    def _plug(self) -> PersonaPlug | None:
        """What makes the row's soft tokens, if it has any."""
        trained = self.condition.trained
        if trained is None or not trained.soft:
            return None
        return self.run.load_plug(trained.name, seed=self.seed, models=self.models)

    @cached_property
    def _prompter(self) -> SoftPrompter | None:
        plug, persona_scale = self._plug, self.config.persona_scale
        if plug is None:
            return None
        if self.condition.persona == "random-vectors":
            return Personalizer(plug, table=RandomVectors(self.table, seed=self.seed), persona_scale=persona_scale)
        personalizer = Personalizer(plug, table=self.table, persona_scale=persona_scale)
        return MeanPersona(personalizer, self.shown.samples) if self.condition.persona == "mean" else personalizer

    def _matrices(self, showing: Showing) -> LoraPredictor | None:
        trained, per_user = self.condition.trained, self.condition.per_user
        if trained is None or not trained.in_matrices:
            return None
        texts = showing.texts() if per_user else []
        return LoraPredictor(self.run, self.models, texts=texts, latest=self.config.max_eval_history, seed=self.seed)

    def _depends_on(self) -> list[Any]:
        """Everything that this row's answers come from."""
        llm = self.models.llm
        parts = [
            samples_fingerprint(self.shown.samples, self.table),
            self.decoding,
            list(self.run.task.labels),
            asdict(self.generation),
            llm.identity.fingerprint,
            [llm.dtype, "logits in float32"],
            self.run.config.model.max_prompt_tokens,
            self.condition.persona,
        ]
        for trained in self.condition.needs:
            for weights in sorted(self.run.plug_folder(trained.name, seed=self.seed).glob("*.safetensors")):
                parts.append(hashlib.sha256(weights.read_bytes()).hexdigest())
        if self.config.persona_scale != 1:
            parts.append(self.config.persona_scale)
        return parts + ([asdict(self.run.config.adapter), self.seed] if self.condition.per_user else [])
