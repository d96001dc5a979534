"""Check chats of four turns through OpenAI's client: the user's manners, instructions and feedback.

    python benchmarks/served_chats.py --run RUN --data DATA/Manners [--vllm http://127.0.0.1:8123] [--json FILE]

`personaplug serve` answers users of DATA's dev split. A new store has their histories. Each user asks four questions in
one chat. The third question has an instruction of `simulate --kind manners` that contradicts the user's manners. The
first question is asked again after a thumb down on its answer, and again after the user states a preference. Answers
are greedy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
from serving import our_server

from personaplug.data import open_dataset
from personaplug.data.manner_wording import INSTRUCTIONS, Instruction
from personaplug.data.manners import Manners, manners_met, read_manners
from personaplug.data.parsing import record_of
from personaplug.data.records import Sample, last_message
from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions

TURNS, INSTRUCTED_TURN = 4, 2
MAX_TOKENS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run trained on simulated manners")
    parser.add_argument("--data", required=True, help="the data set of manners")
    parser.add_argument("--vllm", default="", help="address of a vLLM server; empty = the embedded engine")
    parser.add_argument("--users", type=int, default=3)
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    samples = list(open_dataset(arguments.data, "dev"))
    by_user = {sample.user_id or "": sample for sample in samples}
    asking = list(by_user.values())[: arguments.users]
    questions = list(dict.fromkeys(last_message(s.prompt) for s in samples if s.user_id not in _ids(asking)))
    with (
        tempfile.TemporaryDirectory() as folder,
        our_server(Path(arguments.run), Path(folder, "chats.db"), arguments.vllm or "local") as url,
    ):
        users = [_converse(url, sample, questions[:TURNS]) for sample in asking]
    results = {"engine": "vllm" if arguments.vllm else "embedded", "users": users, "totals": _totals(users)}
    print(json.dumps(results["totals"], indent=1))
    if arguments.json:
        write_json(Path(arguments.json), results | {"versions": package_versions(), "machine": machine_info()})


def _ids(samples: Sequence[Sample]) -> set[str | None]:
    return {sample.user_id for sample in samples}


def _converse(url: str, sample: Sample, questions: Sequence[str]) -> dict[str, Any]:
    """Run a chat of one user; return its texts and the shares of manners that they follow."""
    user, target = sample.user_id or "", sample.target or ""
    items = [record_of(item) | {"id": item.id} for item in sample.history]
    httpx.post(f"{url}/v1/users/{user}/history", json={"items": items}, timeout=60).raise_for_status()
    instruction = next(each for each in INSTRUCTIONS.values() if each.contradicts(_manners_of(target)))
    turns: list[Any] = []
    answers = []
    for number, question in enumerate(questions):
        words = f" {instruction.wordings[-1]}" if number == INSTRUCTED_TURN else ""
        turns.append({"role": "user", "content": question + words})
        answers.append(_ask(url, user, turns)[0])
        turns.append({"role": "assistant", "content": answers[-1]})
    followed = _follows(answers[INSTRUCTED_TURN], instruction, target)
    plain, _ = _ask(url, user, turns[:1], personaplug={"persona_scale": 0})
    return {
        "user": user,
        "kept": target,
        "turns": turns,
        "plain": plain,
        "manners": [_share(answer, target) for answer in answers],
        "plain_manners": _share(plain, target),
        "instruction_followed": followed,
        **_after_feedback(url, user, turns[:1]),
    }


def _after_feedback(url: str, user: str, turns: Sequence[Any]) -> dict[str, Any]:
    """Ask a question again after a thumb down and after a stated preference."""
    first, request_id = _ask(url, user, turns)
    httpx.post(f"{url}/v1/users/{user}/history", json={"request_id": request_id, "rating": "down"}).raise_for_status()
    second, _ = _ask(url, user, turns)
    stated = {"preferences": ["Please write in lower case only."]}
    httpx.put(f"{url}/v1/users/{user}/preferences", json=stated).raise_for_status()
    third, _ = _ask(url, user, turns)
    return {
        "again": first,
        "after_thumb_down": second,
        "after_preference": third,
        "thumb_down_changes": second != first,
        "preference_changes": third != second,
    }


def _ask(url: str, user: str, turns: Sequence[Any], **personaplug: Any) -> tuple[str, str]:
    """Return the answer to a chat and the id of the request."""
    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    reply = client.chat.completions.create(
        model=model, messages=list(turns), user=user, temperature=0, max_tokens=MAX_TOKENS, extra_body=personaplug
    )
    return reply.choices[0].message.content, reply._request_id


def _manners_of(answer: str) -> Manners:
    return Manners(**{name: value for name, value in read_manners(answer).items() if value is not None})


def _follows(answer: str, instruction: Instruction, target: str) -> bool:
    expected = instruction.obeyed_by(_manners_of(target))
    manners = read_manners(answer)
    return all(manners[name] in (None, getattr(expected, name)) for name in instruction.values)


def _share(answer: str, target: str) -> float:
    met = manners_met(answer, target)
    return round(sum(met.values()) / len(met), 3)


def _totals(users: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> float:
        return round(sum(values) / len(values), 3)

    return {
        "users": len(users),
        "manners_by_turn": [mean([user["manners"][turn] for user in users]) for turn in range(TURNS)],
        "plain_manners": mean([user["plain_manners"] for user in users]),
        **{
            name: mean([user[name] for user in users])
            for name in ("instruction_followed", "thumb_down_changes", "preference_changes")
        },
    }


if __name__ == "__main__":
    main()
