"""CopyHeadPart: the training of a copy head behind a trained plug, or behind its control."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from personaplug.data.task import Task
from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.errors import ConfigError
from personaplug.infra.distributed import on_main
from personaplug.infra.progress import Progress
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.copied_answers import MAX_ANSWERS, ReadAnswer, check_answers, check_model, read_answers
from personaplug.llm.copy_head import CopyHead, CopyInputs
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Models, Run
from personaplug.training.batching import micro_batches, spaced
from personaplug.training.copy_head_fit import CopyHeadReport, CopySample, fit_copy_head
from personaplug.training.objectives import prompts_with
from personaplug.training.parts import INSTRUCTION, PLUG, SoftPromptPart
from personaplug.training.trainings import TrainedPart, Trainings

MAX_SAMPLES = 400
"""Upper bound of the training samples, because all their states are in memory."""

_READ_TOGETHER = 256  # past answers between two reports of the progress
_PASS_TOKENS = 4096  # of prompts and answers in one pass of the language model


@dataclass(frozen=True)
class CopyHeadPart(TrainedPart):
    """A copy head behind the soft tokens of another trained part.

    Attributes:
        base: the part that makes the soft tokens.
    """

    base: SoftPromptPart = PLUG

    def check(self, task: Task) -> None:
        check_answers(task)

    def check_run(self, run: Run, models: Models) -> None:
        if run.config.plug.placement != "suffix":
            raise ConfigError(
                f"A copy head needs placement=suffix; {run.folder} has placement={run.config.plug.placement}. Train a "
                f"run with placement=suffix, or leave {self.name} out."
            )
        check_model(models.llm)

    def prepare(self, trainings: Trainings, *, seed: int) -> None:
        trainings.train(self.base, seed=seed)

    def fit(self, trainings: Trainings, *, seed: int) -> dict[str, object]:
        started, run = time.monotonic(), trainings.run
        head = check_model(trainings.models.llm).new_copy_head(seed=seed)
        report = on_main(lambda: self._fit(head, trainings, seed=seed))
        on_main(lambda: head.save(run.plug_folder(self.name, seed=seed)))
        report = replace(report, seconds=round(time.monotonic() - started, 1))
        return trainings.facts(report, head, unit="token", seed=seed)

    def _fit(self, head: CopyHead, trainings: Trainings, *, seed: int) -> CopyHeadReport:
        llm = check_model(trainings.models.llm)
        split = trainings.split(trainings.samples, seed=seed)  # the users that the plug's training held out
        parts = [[part[index] for index in spaced(len(part), MAX_SAMPLES)] for part in split]
        plug = trainings.run.load_plug(self.base.name, seed=seed, models=trainings.models)
        personalizer = Personalizer(plug, table=trainings.embeddings)
        texts = trainings.with_answers([sample for part in parts for sample in part], latest=MAX_ANSWERS)
        samples = copy_samples(llm, personalizer, texts, layer=head.layer)
        held_out_users = {sample.owner for sample in parts[1]}
        train, held_out = (
            [sample for sample in samples if (sample.owner in held_out_users) == is_held_out]
            for is_held_out in (False, True)
        )
        return fit_copy_head(head, train, held_out=held_out, seed=seed, title=f"{self.name} (seed {seed})")


COPY_HEAD = CopyHeadPart("plug+copy-head", PLUG)
INSTRUCTION_COPY_HEAD = CopyHeadPart("instruction+copy-head", INSTRUCTION)


def copy_samples(
    llm: CausalLM, personalizer: Personalizer, samples: Sequence[EncodedSample], *, layer: int
) -> list[CopySample]:
    """Run the language model over samples and past answers, each answer once."""
    inputs = _inputs(llm, personalizer, samples, layer=layer)
    texts = list(dict.fromkeys(text for sample in samples for text in sample.own_answers))
    answers = dict[str, ReadAnswer]()
    with Progress("read past answers", total=len(texts), unit="answers") as progress:
        for start in range(0, len(texts), _READ_TOGETHER):
            part = texts[start : start + _READ_TOGETHER]
            answers |= dict(zip(part, read_answers(llm, part, layer=layer), strict=True))
            progress.advance(len(part))
    return [
        CopySample(sample_inputs, sample.owner, [answers[text] for text in sample.own_answers])
        for sample, sample_inputs in zip(samples, inputs, strict=True)
    ]


@torch.no_grad()
def _inputs(
    llm: CausalLM, personalizer: Personalizer, samples: Sequence[EncodedSample], *, layer: int
) -> list[CopyInputs]:
    llm.cache_prompts([sample.prompt for sample in samples])
    targets = llm.prompt_tokenizer.encode_targets([sample.target or "" for sample in samples])
    lengths = [measure.tokens for measure in llm.measure([sample.prompt for sample in samples])]
    totals = [length + len(ids) for length, ids in zip(lengths, targets, strict=True)]
    inputs: dict[int, CopyInputs] = {}
    for indices in micro_batches(range(len(samples)), lengths=totals, max_tokens=_PASS_TOKENS):
        part = [samples[index] for index in indices]
        batch = prompts_with(personalizer.soft_prompt(part), part)
        rows = llm.cached_prefix.copy_inputs(batch, [targets[index] for index in indices], layer=layer)
        inputs |= dict(zip(indices, rows, strict=True))
    return [inputs[index] for index in range(len(samples))]
