"""Parts that baselines train once per seed for all users: the task's LoRA and the ROPG retriever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from personaplug.baselines.lora import TASK, LoraAdapters
from personaplug.baselines.ropg import RopgObjective, RopgRetriever, RopgTeacher
from personaplug.infra.distributed import main_first, on_main
from personaplug.infra.tensor_files import load_tensors, save_tensors
from personaplug.run import Models, Run
from personaplug.training.objectives import LoraObjective
from personaplug.training.parts import closed_labels
from personaplug.training.trainings import TrainedPart, Trainings

ADAPTER = "adapter.safetensors"


@dataclass(frozen=True)
class LoraPart(TrainedPart):
    """The task's LoRA in the language model."""

    def fit(self, trainings: Trainings, *, seed: int) -> dict[str, object]:
        run, settings = trainings.run, trainings.run.config.adapter
        with LoraAdapters.attach(trainings.models.llm, config=settings) as adapters:
            adapters.reset(TASK, seed=seed)
            objective = LoraObjective(adapters, trainings.models.llm, config=settings, labels=closed_labels(run))
            with adapters.trainable(TASK):
                facts = trainings.fit(self, objective, trainings.samples, seed=seed)
            state = adapters.state(TASK)
        folder = run.plug_folder(self.name, seed=seed)
        on_main(lambda: save_tensors(folder / ADAPTER, state))
        return facts


@dataclass(frozen=True)
class RopgPart(TrainedPart):
    """A retriever that the language model teaches to rank items (ROPG-KD)."""

    def prepare(self, trainings: Trainings, *, seed: int) -> None:
        trainings.models.llm.clear_cache()

    def fit(self, trainings: Trainings, *, seed: int) -> dict[str, object]:
        run, models, settings = trainings.run, trainings.models, trainings.run.config.retrieval
        folder = run.plug_folder(self.name, seed=seed)
        teacher = RopgTeacher(
            folder / "ranking_targets.jsonl",
            llm=models.llm,
            formatter=trainings.prompts.formatter,
            retriever=trainings.prompts.retriever("dense", seed=seed),
            candidates=settings.retriever_candidates,
            seed=seed,
            owner=on_main(lambda: run.owner(self.name, seed=seed)),
        )
        targets = main_first(lambda: teacher.targets(trainings.texts(settings.retriever_samples)))
        samples = [sample for sample in trainings.samples if sample.id in targets]
        retriever = RopgRetriever(models.encoder.width)
        objective = RopgObjective(
            retriever,
            targets,
            samples=samples,
            encoder=models.encoder,
            table=trainings.embeddings,
        )
        facts = trainings.fit(self, objective, samples, seed=seed)
        on_main(lambda: retriever.save(folder))
        return facts


LORA = LoraPart("lora")
ROPG = RopgPart("ropg")


@contextmanager
def task_lora(run: Run, models: Models, *, seed: int) -> Iterator[LoraAdapters]:
    """Load the task's LoRA into the language model, and apply it within a block."""
    folder = run.check_trained(LORA.name, seed=seed)
    remedy = f"Restore it, or delete {folder} and train the LoRA again."
    with LoraAdapters.attach(models.llm, config=run.config.adapter) as adapters:
        adapters.load(TASK, load_tensors(folder / ADAPTER, remedy=remedy))
        with adapters.active(TASK):
            yield adapters
