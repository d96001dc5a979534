"""Rows that use the frozen language model: bare, with soft tokens, with texts in the prompt, with a copy head."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from personaplug.analysis.method_info import SHUFFLED
from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import EncodedSample, past_answers, samples_fingerprint
from personaplug.errors import ConfigError
from personaplug.llm.copied_answers import MAX_ANSWERS, check_model
from personaplug.methods.base import Method, ModelInputs
from personaplug.methods.context import Assignment, EvalContext, with_assigned_items
from personaplug.methods.copy_heads import CopyingPrompter
from personaplug.methods.costs import UserCost
from personaplug.methods.divergence import divergence, plain_answers
from personaplug.methods.identification import identification
from personaplug.methods.personas import MeanPersona, NoisePictures, RandomVectors, StrangersPictures
from personaplug.methods.predictions import Predictions, predict_samples, reference_nll
from personaplug.methods.prompt_texts import PromptTexts
from personaplug.methods.sampled_answers import sampled_answers
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer, SoftPrompter, Vectors
from personaplug.training.copy_head_part import CopyHeadPart
from personaplug.training.parts import SoftPromptPart
from personaplug.training.trainings import TrainedPart


@dataclass(frozen=True)
class LanguageModelMethod(Method):
    """The frozen language model with soft tokens, texts of the history, a copy head, or none of these.

    Attributes:
        soft: the trained part that makes soft tokens; None = no soft tokens.
        texts: the texts of the history in the prompt; None = the bare prompt.
        copy_head: the trained head that copies tokens of the prompt and of past answers; None = no copy head.
    """

    soft: SoftPromptPart | None = None
    texts: PromptTexts | None = None
    copy_head: CopyHeadPart | None = None

    @property
    def requires(self) -> tuple[TrainedPart, ...]:
        own = tuple(part for part in (self.soft, self.copy_head) if part is not None)
        return (*(self.texts.requires if self.texts else ()), *own)

    def check_decoding(self, num_beams: int) -> None:
        if self.copy_head is not None and num_beams > 1:
            raise ConfigError(f"{self.name} needs num_beams=1, because a copy head has no beams; found {num_beams}.")

    def build_inputs(self, context: EvalContext, assignments: Sequence[Assignment], *, seed: int) -> ModelInputs:
        own = context.run.config.plug
        samples = with_assigned_items(
            context.samples_for(self.soft.plug_config(own) if self.soft else own), assignments
        )
        if self.copy_head and context.config.persona_scale:  # a scale of 0 is the plain model
            items = context.assigned_items(assignments)
            samples = [
                replace(sample, own_answers=past_answers(history, latest=MAX_ANSWERS))
                for sample, history in zip(samples, items, strict=True)
            ]
        inputs = ModelInputs(
            samples,
            assignments,
            prompt_lengths=context.prompt_lengths,
            items_used=[len(sample.rows) for sample in samples],
        )
        return inputs if self.texts is None else self.texts.added_to(inputs, context, seed=seed)

    def predict(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> Predictions:
        return self._predict(context, inputs.samples, prompter=self.prompter(context, inputs, seed=seed), seed=seed)

    def reference_nll(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[list[float]] | None:
        prompter = self.prompter(context, inputs, seed=seed)
        return self._reference_nll(context, inputs.samples, prompter=prompter, seed=seed)

    def divergence(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[list[float]] | None:
        """Return None for a row with a copy head, because its words do not come from the logits alone."""
        if self.copy_head:
            return None
        llm, size = context.models.llm, context.config.evaluation_batch_size
        return divergence(
            llm,
            inputs.samples,
            plain=context.samples,
            answers=context.once("plain-answers", lambda: plain_answers(llm, context.samples, batch_size=size)),
            prompter=self.prompter(context, inputs, seed=seed),
            batch_size=size,
            title=f"{self._title(seed)}, divergence",
        )

    def identification(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[float | None] | None:
        """Return None for a row whose prompts, soft tokens and copied texts are the same for all users."""
        if not self._differs_between_users(context):
            return None
        return identification(
            context,
            inputs,
            build=lambda assignments: self.build_inputs(context, assignments, seed=seed),
            prompter=self.prompter(context, inputs, seed=seed),
            title=f"{self._title(seed)}, identification",
        )

    def sampled_answers(
        self, context: EvalContext, inputs: ModelInputs, *, count: int, seed: int
    ) -> list[list[str]] | None:
        prompter = self.prompter(context, inputs, seed=seed)
        return self._sampled_answers(context, inputs.samples, prompter=prompter, count=count, seed=seed)

    def prompter(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> SoftPrompter | None:
        """Return the source of the row's soft tokens, with its copy head; None if the row has no soft tokens."""
        plug = self._plug(context, seed=seed)
        if plug is None:
            return None
        table = self._item_vectors(context, seed=seed)
        personalizer = Personalizer(plug, table=table, persona_scale=context.config.persona_scale)
        if self.copy_head is None or not context.config.persona_scale:
            return personalizer
        llm = check_model(context.models.llm)
        head = llm.load_copy_head(context.run.check_trained(self.copy_head.name, seed=seed))
        return CopyingPrompter(personalizer, head=head, llm=llm)

    def cache_key(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> list[Any] | None:
        llm, run = context.models.llm, context.run
        return [
            samples_fingerprint(inputs.samples, context.embeddings),
            context.decoding,
            list(run.task.labels),
            asdict(context.generation),
            [llm.identity.fingerprint, llm.dtype],
            run.config.model.max_prompt_tokens,
            type(self).__name__,
            [
                hashlib.sha256(weights.read_bytes()).hexdigest()
                for part in self.requires
                for weights in sorted(run.plug_folder(part.name, seed=seed).glob("*.safetensors"))
            ],
            context.config.persona_scale,
        ]

    def user_cost(self, context: EvalContext, inputs: ModelInputs) -> UserCost | None:
        cost = inputs.user_cost or UserCost()
        if self._embeds_items or (self.texts is not None and self.texts.embeds_items):
            cost += context.costs.embeddings()
        if self.soft is not None and self.soft.counts_labels:
            cost += context.costs.labels()
        if self.copy_head or (self.texts is not None and self.texts.keeps_texts):
            cost += context.costs.texts()
        return cost

    def soft_tokens(self, context: EvalContext) -> int:
        if self.soft is None or context.config.persona_scale == 0:
            return 0
        return self.soft.plug_config(context.run.config.plug).soft_tokens

    def ignored_items(self, context: EvalContext, *, seed: int) -> int:
        plug = self._plug(context, seed=seed)
        return 0 if plug is None else plug.cold_start.ignored_items

    def remark(self, task: Task) -> str | None:
        if self.info.history == SHUFFLED and self.info.control_of == "plug":
            return "shuffled equals plug here, because the plug ignores the order of the items."
        return super().remark(task)

    @property
    def _embeds_items(self) -> bool:
        return self.soft is not None and self.soft.reads_items and self.info.history != "none"

    def _differs_between_users(self, context: EvalContext) -> bool:
        reads_items = bool(self.copy_head) or (self.soft is not None and self.soft.reads_items)
        has_persona = reads_items and context.config.persona_scale > 0
        return self.info.history != "none" and (has_persona or self.texts is not None)

    def _item_vectors(self, context: EvalContext, *, seed: int) -> Vectors:
        """Return the vectors of the items that the plug reads."""
        return context.embeddings

    def _plug(self, context: EvalContext, *, seed: int) -> PersonaPlug | None:
        return None if self.soft is None else context.load_plug(self.soft.name, seed=seed)

    def _predict(
        self, context: EvalContext, samples: Sequence[EncodedSample], *, prompter: SoftPrompter | None, seed: int
    ) -> Predictions:
        return predict_samples(
            context.models.llm,
            samples,
            prompter=prompter,
            task=context.task,
            decoding=context.decoding,
            generation=context.generation,
            batch_size=context.config.evaluation_batch_size,
            title=self._title(seed),
        )

    def _reference_nll(
        self, context: EvalContext, samples: Sequence[EncodedSample], *, prompter: SoftPrompter | None, seed: int
    ) -> list[list[float]]:
        return reference_nll(
            context.models.llm,
            samples,
            prompter=prompter,
            batch_size=context.config.evaluation_batch_size,
            title=f"{self._title(seed)}, likelihood",
        )

    def _sampled_answers(
        self,
        context: EvalContext,
        samples: Sequence[EncodedSample],
        *,
        prompter: SoftPrompter | None,
        count: int,
        seed: int,
    ) -> list[list[str]]:
        return sampled_answers(
            context.models.llm,
            samples,
            prompter=prompter,
            generation=context.sampling,
            count=count,
            batch_size=context.config.evaluation_batch_size,
            title=f"{self._title(seed)}, sampled answers",
        )

    def _title(self, seed: int) -> str:
        return f"{self.name} (seed {seed})" if self.info.is_seeded else self.name


@dataclass(frozen=True)
class RandomVectorsMethod(LanguageModelMethod):
    """The plug with random vectors, and no answers, instead of the user's items."""

    def build_inputs(self, context: EvalContext, assignments: Sequence[Assignment], *, seed: int) -> ModelInputs:
        inputs = super().build_inputs(context, assignments, seed=seed)
        samples = [
            replace(sample, label_ids=np.full_like(sample.label_ids, -1), style=np.zeros_like(sample.style))
            for sample in inputs.samples
        ]
        return replace(inputs, samples=samples)

    def _item_vectors(self, context: EvalContext, *, seed: int) -> Vectors:
        return RandomVectors(context.embeddings, seed=seed)


@dataclass(frozen=True)
class NoisePicturesMethod(LanguageModelMethod):
    """The plug with pictures of noise instead of the items' pictures."""

    def _item_vectors(self, context: EvalContext, *, seed: int) -> Vectors:
        encoder = context.models.encoder
        # Predictions and likelihoods share the noise, so it is encoded once.
        return context.once(("noise", seed), lambda: NoisePictures(context.embeddings, encoder, seed=seed))


@dataclass(frozen=True)
class StrangersPicturesMethod(LanguageModelMethod):
    """The plug with the user's own texts and answers, and a stranger's pictures."""

    def prompter(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> SoftPrompter | None:
        personalizer = super().prompter(context, inputs, seed=seed)
        assert isinstance(personalizer, Personalizer)
        encoder = context.models.encoder.identity
        return StrangersPictures(personalizer, inputs.samples, encoder=encoder, seed=seed)

    def _differs_between_users(self, context: EvalContext) -> bool:
        return False  # strangers are drawn to the samples with their own items only


@dataclass(frozen=True)
class MeanPersonaMethod(LanguageModelMethod):
    """The plug with the mean persona of all samples for every user."""

    def prompter(self, context: EvalContext, inputs: ModelInputs, *, seed: int) -> SoftPrompter | None:
        personalizer = super().prompter(context, inputs, seed=seed)
        assert isinstance(personalizer, Personalizer)
        return MeanPersona(personalizer, inputs.samples)

    @property
    def _embeds_items(self) -> bool:
        return False

    def _differs_between_users(self, context: EvalContext) -> bool:
        return False
