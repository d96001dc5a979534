"""Files of API keys: several writers, a server that runs, names."""

from __future__ import annotations

import logging
import multiprocessing
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from personaplug.cli.main import main
from personaplug.errors import ConfigError, MissingData
from personaplug.serving import api_keys as api_keys_module
from personaplug.serving.api_keys import ApiKeys, create_key, revoke_keys


def _create_twenty(path: Path) -> list[str]:
    return [create_key(path, f"tenant-{number}") for number in range(20)]


@pytest.fixture(autouse=True)
def _quick_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys_module, "_RELOAD_INTERVAL_S", 0.0)


def test_keys_that_are_made_at_once_are_all_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with multiprocessing.get_context("fork").Pool(2) as processes, ThreadPoolExecutor(13) as threads:
        made = processes.map_async(_create_twenty, [path] * 2, chunksize=1)
        keys = list(threads.map(lambda number: create_key(path, f"shop-{number}"), range(13)))
        for others in made.get(timeout=60):
            keys += others
    assert len(set(keys)) == 13 + 2 * 20
    loaded = ApiKeys.load(path)
    assert all(loaded.tenant_of(f"Bearer {key}") for key in keys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]


def test_server_sees_keys_that_are_made_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    shop, bank = create_key(path, "shop"), create_key(path, "bank")
    server = ApiKeys.load(path)
    second = create_key(path, "shop")
    assert server.tenant_of(f"Bearer {second}") == "shop"
    assert revoke_keys(path, second) == 1
    assert (server.tenant_of(f"Bearer {second}"), server.tenant_of(f"Bearer {shop}")) == (None, "shop")
    create_key(path, "shop")
    assert revoke_keys(path, "shop") == 2
    assert (server.tenant_of(f"Bearer {shop}"), server.tenant_of(f"Bearer {bank}")) == (None, "bank")
    with pytest.raises(MissingData, match="neither"):
        revoke_keys(path, "shop")
    assert revoke_keys(path, "bank") == 1
    assert server.tenant_of(f"Bearer {bank}") is None  # nobody, and not everybody


def test_change_is_seen_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = tmp_path / "keys.json"
    key = create_key(path, "shop")
    server = ApiKeys.load(path)
    revoke_keys(path, "shop")
    deadline = time.monotonic() + 5
    while server.tenant_of(f"Bearer {key}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert api_keys_module._RELOAD_INTERVAL_S <= 1


def test_damaged_file_keeps_the_last_good_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    path = tmp_path / "keys.json"
    key = create_key(path, "shop")
    server = ApiKeys.load(path)
    good = path.read_bytes()
    for broken in (good[:20], b"[]", b'{"%s": "a\\nb"}' % (b"0" * 64)):
        path.write_bytes(broken)
        caplog.clear()
        for _ in range(3):
            assert server.tenant_of(f"Bearer {key}") == "shop"
        assert len([record for record in caplog.records if "stay valid" in record.getMessage()]) == 1
    path.unlink()
    assert server.tenant_of(f"Bearer {key}") == "shop"
    with pytest.raises(MissingData):
        ApiKeys.load(path)


@pytest.mark.parametrize("tenant", ["", " ", "a\nb", "a\u202eb", "a\ufffdb", "..", "x" * 256, "\ud800"])
def test_name_that_can_never_work_is_refused(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(ConfigError, match="name of a tenant"):
        create_key(tmp_path / "keys.json", tenant)
    assert not (tmp_path / "keys.json").exists()


def test_command_revokes_a_key(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    key = CliRunner().invoke(main, ["create-key", "shop", "--keys", path]).stdout.strip()
    assert ApiKeys.load(Path(path)).tenant_of(f"Bearer {key}") == "shop"
    result = CliRunner().invoke(main, ["revoke-key", key, "--keys", path])
    assert (result.exit_code, "1 keys revoked" in result.stderr) == (0, True)
    assert ApiKeys.load(Path(path)).tenant_of(f"Bearer {key}") is None
    assert CliRunner().invoke(main, ["revoke-key", "shop", "--keys", path]).exit_code != 0


def test_pipe_in_the_place_of_the_file_holds_up_nobody(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = create_key(path, "shop")
    keys = ApiKeys.load(path)
    path.unlink()
    os.mkfifo(path)
    assert keys.tenant_of(f"Bearer {key}") == "shop"  # without a wait for somebody who writes
    with pytest.raises(MissingData):
        ApiKeys.load(path)
