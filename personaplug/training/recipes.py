"""Recipes: what can be trained for the rows of a table, on which samples and prompts, and how it is kept.

- plug, paper, instruction: soft tokens beside the question, with or without a history;
- lora: matrices inside the model, for the task;
- bridge: soft tokens for the model that carries those matrices;
- retriever: a ranking of items, taught by the model (ROPG-KD).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from personaplug.baselines.lora import TASK, LoraAdapters
from personaplug.baselines.prompt_builder import PromptBuilder
from personaplug.baselines.ropg import RetrieverObjective, RopgRetriever, Teacher
from personaplug.data.label_set import LabelSet
from personaplug.data.records import Sample
from personaplug.data.task import Reader
from personaplug.encoders.embedding_store import EmbeddingStore
from personaplug.encoders.encoded_sample import EncodedSample, with_nearest
from personaplug.errors import ConfigError, TrainingDiverged
from personaplug.infra.atomic_io import atomic_write, write_json
from personaplug.infra.distributed import main_first, on_main, synchronized
from personaplug.infra.memory import peak_memory, reset_peak_memory
from personaplug.methods import INSTRUCTION, LORA, PLUG, Trained
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import PlugSpec
from personaplug.run import Models, Run, drawn
from personaplug.training.batching import user_split
from personaplug.training.checkpointing import drop_states
from personaplug.training.objectives import LoraObjective, Objective, PlugObjective
from personaplug.training.trainer import FitReport, fit, mean_loss

logger = logging.getLogger(__name__)

ADAPTER = "adapter.safetensors"
_FEW = 5  # items at most that a user is served without a persona of their own with
_WITHOUT_ITEMS = "plug without items"
_STARTS = 1024  # answers from whose tokens those are drawn that instruction tokens start as


def train(
    run: Run,
    reader: Reader,
    *,
    models: Models,
    wanted: Sequence[Trained] | None = None,
) -> list[Path]:
    """Train what a run's rows need; what is finished already is left as it is.

    Args:
        reader: the training split.
        wanted: what; None = the plug, and its control unless the config does without.
    Returns:
        The folders of what was trained, seed by seed.
    Raises:
        ConfigError, TrainingDiverged, StorageError: see `fit`.
    """
    if wanted is None:
        wanted = (INSTRUCTION, PLUG) if run.config.training.controls else (PLUG,)
    trainings = Trainings(run, reader, models=models)
    return [trainings.train(trained, seed=seed) for seed in run.config.training.seeds for trained in wanted]


def build_plug(run: Run, models: Models, *, trained: Trained = PLUG, seed: int) -> PersonaPlug:
    """A fresh plug (or its control, or the paper's) for the run's models, its first weights drawn by `seed`."""
    identity = models.llm.identity
    spec = PlugSpec(identity, models.llm.embedding_scale, models.encoder.identity, run.task.labels)
    config = trained.plug(run.config.plug)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plug = PersonaPlug(config, spec=spec, encoder=models.encoder)
    return plug.computing_items_in(models.llm.dtype).to(models.llm.device)


@contextmanager
def task_matrices(run: Run, models: Models, *, seed: int) -> Iterator[LoraAdapters]:
    """Let the model carry the task's trained matrices within a block, and apply them.

    Raises:
        MissingData: if their training has not ended.
    """
    weights = run.check_trained(LORA.name, seed=seed) / ADAPTER
    with LoraAdapters.attach(models.llm, config=run.config.adapter) as adapters:
        adapters.load(TASK, load_file(weights))
        with adapters.active(TASK):
            yield adapters


def closed_answers(run: Run) -> tuple[str, ...]:
    """The labels that answers are trained as, without an end of text where none is needed."""
    return run.task.labels if run.config.training.train_eos == "auto" else ()


class Trainings:
    """The trainings of one run: they share models, vectors and, where their prompts agree, samples.

    What the run is going to be trained on is noted in it at once, so that an evaluation can tell known users.
    """

    def __init__(self, run: Run, reader: Reader, *, models: Models) -> None:
        """Read the training split.

        Raises:
            RunConflict: if the run was started on other data.
        """
        self.run, self.reader, self.models = run, reader, models
        self.table, self.plain = main_first(self._read)
        self.prompts = PromptBuilder(run, models, table=self.table)

    def _read(self) -> tuple[EmbeddingStore, list[EncodedSample]]:
        table = self.run.open_vectors(self.models.encoder)
        plain = self.run.read_samples(self.reader, table, limit=self.run.config.training.train_limit)
        self.run.check_data(plain, table)
        return table, plain

    def train(self, trained: Trained, *, seed: int) -> Path:
        """Train one thing with one seed, unless that is done; its folder.

        Raises:
            ConfigError, TrainingDiverged, StorageError: see `fit`.
        """
        folder = self.run.plug_folder(trained.name, seed=seed)
        if on_main(lambda: self.run.trained(trained.name, seed=seed)):
            logger.info("%s (seed %d) is trained already", trained.name, seed)
            return folder
        if self._has_control(trained):
            self._train_control(seed)
        reset_peak_memory()
        if trained.kind == "retriever":
            self.models.llm.clear_cache()
        if trained.kind == "lora":
            self._lora(trained, seed=seed)
        elif trained.kind == "bridge":
            with task_matrices(self.run, self.models, seed=seed):
                self._plug(trained, seed=seed)
        elif trained.kind == "retriever":
            self._retriever(trained, seed=seed)
        else:
            self._plug(trained, seed=seed)
        on_main(lambda: drop_states(folder))
        return folder

    def _plug(self, trained: Trained, *, seed: int) -> None:
        read = main_first(lambda: self._samples(trained, seed=seed))  # it may have items to encode
        with synchronized():
            plug = build_plug(self.run, self.models, trained=trained, seed=seed)
            samples = with_nearest(read, self.table, count=plug.config.selected_items)
            if plug.config.instruction_start == "words":
                self._start(plug, samples, seed=seed)
            if plug.label_prior is not None:
                plug.label_prior.start_from(self._answered(samples))
        objective = PlugObjective(plug, self.models.llm, table=self.table, labels=closed_answers(self.run))
        facts = self._fit(trained, objective, samples, seed=seed)
        if self._has_control(trained):
            facts |= self._choose_cold_start(plug, objective, read, seed=seed)
        folder = self.run.plug_folder(trained.name, seed=seed)
        told = {key: facts[key] for key in facts if key != "parameters"}
        on_main(lambda: plug.save_pretrained(folder, facts=told))
        on_main(lambda: write_json(folder / "fit.json", facts))

    def _has_control(self, trained: Trained) -> bool:
        return trained == PLUG and self.run.config.training.controls

    def _train_control(self, seed: int) -> None:
        """Train what may serve the plug's users of few items; the plug can do without."""
        try:
            self.train(INSTRUCTION, seed=seed)
        except TrainingDiverged as error:
            logger.warning("%s; the plug is trained without it", error)

    def _choose_cold_start(
        self, plug: PersonaPlug, objective: PlugObjective, samples: Sequence[EncodedSample], *, seed: int
    ) -> dict[str, object]:
        """Choose what serves users of few items.

        Those without any get the control's tokens, which know of nobody, or the plug's own, whichever held-out users
        lose less with when no item is shown; and so do those of one, two, … items, up to the last number, from none
        on, with which held-out users lose less by that than by a persona made of so few.

        Args:
            samples: with all items, of which a plug that takes the nearest only has still to take them.
        Returns:
            What they lose with either, by the number of items that they are shown, up to the first, from one on,
            where a persona wins.
        """
        if not on_main(lambda: self.run.trained(INSTRUCTION.name, seed=seed)):
            return {}
        config = self.run.config.training
        _, held = user_split(samples, share=config.validation_share, limit=config.validation_limit, seed=seed)
        with synchronized():
            control = self.run.load_plug(INSTRUCTION.name, seed=seed, models=self.models).instruction.detach()
        losses: dict[int, dict[str, float]] = {}
        tokens: torch.Tensor | None = control
        name, chosen = INSTRUCTION.name, 0
        read = min(plug.config.max_history, plug.config.selected_items or plug.config.max_history)
        most = min(_FEW, read - 1)  # or nobody would ever have a persona
        for items in range(most + 1):
            shown = [sample.latest(items) for sample in held if len(sample.rows) >= items]
            if not shown:
                break
            plug.set_cold_start(None)
            own = mean_loss(objective, shown, most=config.max_tokens_per_microbatch)
            plug.set_cold_start(tokens, items=items)
            losses[items] = {"plug": own, name: mean_loss(objective, shown, most=config.max_tokens_per_microbatch)}
            if losses[items][name] < own:
                chosen = items
            elif items == 0:
                tokens, name = None, _WITHOUT_ITEMS
            else:
                break
        plug.set_cold_start(tokens, items=chosen)
        return {"loss_of_few_items": losses}

    def _start(self, plug: PersonaPlug, samples: Sequence[EncodedSample], *, seed: int) -> None:
        """Let a plug's instruction tokens start as tokens of answers."""
        rng, wanted = np.random.default_rng([seed, 9]), len(plug.instruction)
        answers = [samples[place].target or "" for place in rng.permutation(len(samples))[:_STARTS]]
        tokens = self.models.llm.embed_texts(answers)
        if len(tokens):
            plug.start_from(tokens[rng.choice(len(tokens), size=wanted, replace=len(tokens) < wanted)])

    def _answered(self, samples: Sequence[EncodedSample]) -> torch.Tensor:
        """Places of the samples' answers among the task's labels.

        Raises:
            ConfigError: if they are not trained as such.
        """
        if not closed_answers(self.run):
            raise ConfigError("What a user's own labels say is added to labels that are scored; give train_eos=auto.")
        closed = LabelSet(self.run.task.labels)
        return torch.tensor([closed.place(sample.target) for sample in samples])

    def _lora(self, trained: Trained, *, seed: int) -> None:
        folder = self.run.plug_folder(trained.name, seed=seed)
        settings = self.run.config.adapter
        with LoraAdapters.attach(self.models.llm, config=settings) as adapters:
            adapters.reset(TASK, seed=seed)
            objective = LoraObjective(adapters, self.models.llm, config=settings, labels=closed_answers(self.run))
            with adapters.trainable(TASK):
                facts = self._fit(trained, objective, self.plain, seed=seed)
            state = adapters.state(TASK)
        on_main(lambda: atomic_write(folder / ADAPTER, lambda path: save_file(state, path)))
        on_main(lambda: write_json(folder / "fit.json", facts))

    def _retriever(self, trained: Trained, *, seed: int) -> None:
        folder, settings = self.run.plug_folder(trained.name, seed=seed), self.run.config.retrieval
        teacher = Teacher(
            folder / "lessons.jsonl",
            llm=self.models.llm,
            writer=self.prompts.writer,
            retriever=self.prompts.retriever("dense", seed=seed),
            candidates=settings.retriever_candidates,
            seed=seed,
        )
        lessons = main_first(lambda: teacher.lessons(self._texts(settings.retriever_samples)))
        samples = [sample for sample in self.plain if sample.id in lessons]
        retriever = RopgRetriever(self.models.encoder.width)
        objective = RetrieverObjective(
            retriever,
            lessons,
            samples=samples,
            encoder=self.models.encoder,
            table=self.table,
            temperature=settings.retriever_temperature,
        )
        facts = self._fit(trained, objective, samples, seed=seed)
        on_main(lambda: retriever.save(folder))
        on_main(lambda: write_json(folder / "fit.json", facts))

    def _fit(
        self, trained: Trained, objective: Objective, samples: Sequence[EncodedSample], *, seed: int
    ) -> dict[str, object]:
        """Train, and say what the training was."""
        report: FitReport = fit(
            objective,
            samples=samples,
            config=self.run.config.training,
            seed=seed,
            folder=self.run.plug_folder(trained.name, seed=seed),
            title=f"{trained.name} (seed {seed})",
        )
        about = {"task": self.run.task.name, "seed": seed, "peak_memory_bytes": peak_memory()}
        return asdict(report) | about | {"unit": objective.unit, "parameters": _count(objective.module)}

    def _samples(self, trained: Trained, *, seed: int) -> list[EncodedSample]:
        """The training samples as its plug reads them, with the texts that its prompts show."""
        plug, retrieval = trained.plug(self.run.config.plug), trained.retrieval
        if retrieval is None and plug.answer_channel == self.run.config.plug.answer_channel:
            return self.plain
        limit = self.run.config.training.train_limit
        if retrieval is None:
            return self.run.read_samples(self.reader, self.table, limit=limit, plug=plug)
        lost = 0

        def with_texts(sample: Sample) -> Sample:
            nonlocal lost
            shown = self.prompts.retrieved(sample, retrieval, seed=seed)
            lost += bool(sample.history) and shown.prompt == sample.prompt
            return shown

        samples = self.run.read_samples(self.reader, self.table, limit=limit, plug=plug, rewrite=with_texts)
        if lost:
            logger.warning("%s: in %d of %d training prompts no item found room", retrieval.name, lost, len(samples))
        return samples

    def _texts(self, count: int) -> list[Sample]:
        """So many of the training samples, texts and all, spread evenly over them; 0 = all."""
        known = len(self.plain)
        places = set(np.linspace(0, known - 1, num=min(count or known, known)).round().astype(int).tolist())
        drawn_samples = drawn(self.reader, limit=self.run.config.training.train_limit, seed=0)
        return [sample for place, sample in enumerate(drawn_samples) if place in places]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
