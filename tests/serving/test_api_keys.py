"""API key files: concurrent writers, reloading by a running server, and names."""

from __future__ import annotations

import logging
import multiprocessing
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from live_server import open_service, served

from personaplug.cli.main import main
from personaplug.errors import ConfigError, MissingData
from personaplug.llm.causal_lm import CausalLM
from personaplug.serving import api_keys as api_keys_module
from personaplug.serving.api_keys import ApiKeys, KeyOwner, create_key, revoke_keys


def _create_twenty(path: Path) -> list[str]:
    return [create_key(path, f"tenant-{number}") for number in range(20)]


@pytest.fixture(autouse=True)
def _quick_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys_module, "_RELOAD_INTERVAL_S", 0.0)


def test_concurrently_created_keys_are_all_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with multiprocessing.get_context("fork").Pool(2) as processes, ThreadPoolExecutor(13) as threads:
        lists_of_keys = processes.map_async(_create_twenty, [path] * 2, chunksize=1)
        keys = list(threads.map(lambda number: create_key(path, f"shop-{number}"), range(13)))
        for more_keys in lists_of_keys.get(timeout=60):
            keys += more_keys
    assert len(set(keys)) == 13 + 2 * 20
    loaded = ApiKeys.load(path)
    assert all(loaded.owner_of(f"Bearer {key}") for key in keys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]


def test_server_sees_created_and_revoked_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    shop, bank = create_key(path, "shop"), create_key(path, "bank")
    server = ApiKeys.load(path)
    second = create_key(path, "shop")
    assert server.owner_of(f"Bearer {second}") == KeyOwner("shop")
    assert revoke_keys(path, second) == 1
    assert (server.owner_of(f"Bearer {second}"), server.owner_of(f"Bearer {shop}")) == (None, KeyOwner("shop"))
    create_key(path, "shop")
    assert revoke_keys(path, "shop") == 2
    assert (server.owner_of(f"Bearer {shop}"), server.owner_of(f"Bearer {bank}")) == (None, KeyOwner("bank"))
    with pytest.raises(MissingData, match="neither"):
        revoke_keys(path, "shop")
    assert revoke_keys(path, "bank") == 1
    assert server.owner_of(f"Bearer {bank}") is None  # an empty file does not open the server to everybody


def test_changed_key_file_is_reloaded_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = tmp_path / "keys.json"
    key = create_key(path, "shop")
    server = ApiKeys.load(path)
    revoke_keys(path, "shop")
    deadline = time.monotonic() + 5
    while server.owner_of(f"Bearer {key}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert api_keys_module._RELOAD_INTERVAL_S <= 1


def _file_of(owner: str) -> bytes:
    return f'{{"{"0" * 64}": {owner}}}'.encode()


def test_damaged_key_file_keeps_the_current_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    path = tmp_path / "keys.json"
    key = create_key(path, "shop")
    server = ApiKeys.load(path)
    good = path.read_bytes()
    owners = ('"shop"', '{"tenant": "a\\nb"}', '{"tenant": "a", "usr": "b"}', '{"user": "b"}')
    for broken in (good[:20], b"[]", *map(_file_of, owners)):
        path.write_bytes(broken)
        caplog.clear()
        for _ in range(3):
            assert server.owner_of(f"Bearer {key}") == KeyOwner("shop")
        assert len([record for record in caplog.records if "stay valid" in record.getMessage()]) == 1
    path.unlink()
    assert server.owner_of(f"Bearer {key}") == KeyOwner("shop")
    with pytest.raises(MissingData):
        ApiKeys.load(path)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\u202eb", "a\ufffdb", "..", "x" * 256, "\ud800"])
def test_invalid_name_of_a_tenant_or_user_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name of a tenant"):
        create_key(tmp_path / "keys.json", name)
    with pytest.raises(ConfigError, match="name of a user"):
        create_key(tmp_path / "keys.json", "shop", user=name)
    assert not (tmp_path / "keys.json").exists()


def test_command_revokes_a_key(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    key = CliRunner().invoke(main, ["create-key", "shop", "--keys", path]).stdout.strip()
    assert ApiKeys.load(Path(path)).owner_of(f"Bearer {key}") == KeyOwner("shop")
    result = CliRunner().invoke(main, ["revoke-key", key, "--keys", path])
    assert (result.exit_code, "1 keys revoked" in result.stderr) == (0, True)
    assert ApiKeys.load(Path(path)).owner_of(f"Bearer {key}") is None
    assert CliRunner().invoke(main, ["revoke-key", "shop", "--keys", path]).exit_code != 0


def test_user_key_names_its_user_and_cannot_access_other_users(toy: CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    shop, name = create_key(path, "shop"), "J\xfcrgen/1"
    result = CliRunner().invoke(main, ["create-key", "shop", "--user", name, "--keys", str(path)])
    user_key, turns = result.stdout.strip(), [{"role": "user", "content": "review: tea"}]
    with (
        served(open_service(toy, tmp_path), api_keys=ApiKeys.load(path)) as url,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {user_key}"}, timeout=60) as client,
    ):
        at = "/v1/users/J%C3%BCrgen%2F1"
        assert client.post(f"{at}/history", json={"text": "a film", "score": "5"}).status_code == 200
        assert client.get(f"{at}/preferences").status_code == 200
        for user in (None, name):
            reply = client.post("/v1/chat/completions", json={"messages": turns, "user": user})
            assert reply.headers["x-personaplug-persona"] == "user"
        refused = client.post("/v1/chat/completions", json={"messages": turns, "user": "bob"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "user")
        for other in ("/v1/users/bob", "/v1/users/J%C3%BCrgen", "/v1/users/J%C3%BCrgen/1", "/v1/users/bob/history"):
            assert client.delete(other).status_code == 403
            assert client.get(f"{other}/export").status_code == 403
        reply = httpx.get(f"{url}{at}/export", headers={"Authorization": f"Bearer {shop}"})
        assert len(reply.json()["items"]) == 1


def test_pipe_instead_of_the_key_file_does_not_block(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = create_key(path, "shop")
    keys = ApiKeys.load(path)
    path.unlink()
    os.mkfifo(path)
    assert keys.owner_of(f"Bearer {key}") == KeyOwner("shop")  # without waiting for a writer
    with pytest.raises(MissingData):
        ApiKeys.load(path)
