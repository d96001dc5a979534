"""Jobs whose histories are in a store: they equal jobs with histories in the input, and erased users are left out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from offline_jobs import planned, read_output, trained_run, write_parquet

from personaplug.data import read_items
from personaplug.errors import StoreConflict
from personaplug.inference import load_plug
from personaplug.offline.job import StorePlace
from personaplug.offline.personas import StoredHistories
from personaplug.offline.rows import Row
from personaplug.offline.running import run_job
from personaplug.run import open_models
from personaplug.serving.persona_cache import store_settings
from personaplug.store.history_store import HistoryStore, StoreSettings

TENANT = "shop"


def test_histories_of_a_store_equal_those_of_the_input(tmp_path: Path) -> None:
    run, rows = trained_run(tmp_path)
    models = open_models(run.config)
    location = tmp_path / "users.db"
    with closing(HistoryStore.open(location, models.encoder, settings=store_settings(load_plug(run, models)))) as store:
        for row in rows:
            store.add(store.admit(TENANT, row["user_id"]), read_items(row["history"], task=run.task))
    columns = [{key: row[key] for key in ("id", "user_id", "prompt")} for row in rows]
    place = StorePlace(str(location), TENANT)
    stored = planned(run, write_parquet(tmp_path / "a.parquet", columns), tmp_path / "stored", store=place)
    given = planned(run, write_parquet(tmp_path / "b.parquet", rows), tmp_path / "given")
    for job in (stored, given):
        run_job(job)
    results, expected = read_output(tmp_path / "stored"), read_output(tmp_path / "given")
    assert [(row["id"], row["answer"], row["items"]) for row in results] == [
        (row["id"], row["answer"], row["items"]) for row in expected
    ]
    assert any(row["items"] for row in results)
    assert "users.db" not in str(stored.identity)  # a URL may hold a password


def test_store_of_another_plug_is_refused(tmp_path: Path) -> None:
    run, rows = trained_run(tmp_path)
    settings = StoreSettings(labels=("yes", "no"), encodes_answers=False)
    HistoryStore.open(tmp_path / "users.db", open_models(run.config).encoder, settings=settings).close()
    columns = [{key: row[key] for key in ("user_id", "prompt")} for row in rows]
    source = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(StoreConflict, match="the store was created with other labels"):
        run_job(planned(run, source, tmp_path / "out", store=StorePlace(str(tmp_path / "users.db"))))


def test_shard_is_computed_again_if_a_user_is_erased_meanwhile(tmp_path: Path) -> None:
    run, rows = trained_run(tmp_path)
    models = open_models(run.config)
    plug = load_plug(run, models)
    with closing(HistoryStore.open(tmp_path / "users.db", models.encoder, settings=store_settings(plug))) as store:
        items = next(row["history"] for row in rows if row["history"])
        store.add(store.admit(TENANT, "u"), read_items(items, task=run.task))
        personalizer: Any = type("Part", (), {"plug": plug})
        histories, asked = StoredHistories(personalizer, store, tenant=TENANT), [Row("1", "u")]
        lengths: list[int] = []

        def work() -> Sequence[Any]:
            found = histories.read(asked)
            lengths.append(len(found[0]))
            if len(lengths) == 1:
                store.erase_user(TENANT, "u")
            return found

        [history] = histories.confirmed(asked, work)
        assert (lengths, len(history)) == ([len(items), 0], 0)
