"""Attacks on who is who: ids, keys, web pages and files that others can read."""

from __future__ import annotations

import re
import stat
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import httpx

from attacks import Verdict, case
from attacks.lab import Lab, Server

_REFUSED = (400, 404, 422)


@case("ids that could be another user's")
def confused_ids(lab: Lab, verdict: Verdict) -> None:
    hostile = [
        "J%FCrgen",
        "J%E4rgen",
        "%FF",
        "%C0%AF",
        "%EF%BF%BD",
        "%00",
        "a%0Ab",
        "a%E2%80%AEb",
        "a%E2%81%A6b",
        "%ED%A0%80",
    ]
    with lab.serve("--keep-text") as server:
        for name in hostile:
            status = server.add(lab.items(1), user=name).status_code
            verdict.expect(status in _REFUSED, f"the id {name} is taken: {status}")
            verdict.expect(_chat_as_raw_user(server, name) in _REFUSED, f"a header or query names {name}")
        server.add(lab.items(3), user="ann").raise_for_status()
        routes = [
            "ann%2Fhistory",
            "ann%2fhistory%2fi0",
            "..%2Fann",
            "ann%252Fhistory",
            ".%2E",
            "ann/history/..",
            "ann//",
        ]
        for path in routes:
            _delete_raw(server, f"/v1/users/{path}")
            verdict.expect(server.count("ann") == 3, f"DELETE of {path} reached the user ann")
        for name in ("Jürgen", "李雷", "o'neil@example.com", "a b"):
            encoded = httpx.URL("http://x/" + name).raw_path.decode().removeprefix("/")
            server.add(lab.items(2), user=encoded).raise_for_status()
            verdict.expect(server.count(encoded) == 2, f"the id {name!r} is not kept")


def _delete_raw(server: Server, path: str) -> None:
    """Send a DELETE with the path as it is; httpx would resolve dots first."""
    key = server.keys["a"]
    with server.open_socket() as connection:
        connection.sendall(f"DELETE {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
        connection.recv(100)


def _chat_as_raw_user(server: Server, name: str) -> int:
    """Send the decoded bytes of an id as a header, without httpx's own checks of text."""
    raw = urllib.parse.unquote_to_bytes(name)
    body = b'{"messages":[{"role":"user","content":"x"}],"max_tokens":1,"user":"' + raw + b'"}'
    headers = {"Content-Type": "application/json"}
    return server.call("POST", "/v1/chat/completions", content=body, headers=headers).status_code


@case("another tenant's users")
def other_tenants(lab: Lab, verdict: Verdict) -> None:
    with lab.serve("--keep-text") as server:
        server.add(lab.items(3)).raise_for_status()
        verdict.expect(server.count(tenant="b") == 0, "a list of another tenant's user")
        for method, path in (("GET", "export"), ("GET", "history"), ("DELETE", "history/i0"), ("DELETE", "")):
            server.call(method, f"/v1/users/ann/{path}".rstrip("/"), tenant="b")
            verdict.expect(server.count() == 3, f"{method} {path} of another tenant")
        shown = server.call("GET", "/v1/users/ann/export", tenant="b")
        verdict.expect("western" not in shown.text, "an export of another tenant's user")
        wrong_keys = ({"Authorization": "Bearer x"}, {"Authorization": ""})
        answers = {server.call("GET", "/v1/users/ann/history", headers=each).status_code for each in wrong_keys}
        verdict.expect(answers == {401}, f"without a valid key: {answers}")


@case("web pages of other sites, on an open server")
def web_pages(lab: Lab, verdict: Verdict) -> None:
    item = '{"items": [{"id": "x", "text": "planted", "score": "5"}]}'
    foreign = [
        {"Origin": "http://evil.example", "Content-Type": "application/json"},
        {"Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {},
    ]
    with lab.serve(keys=False) as server:
        for headers in foreign:
            status = server.call("POST", "/v1/users/ann/history", content=item, headers=headers).status_code
            verdict.expect(status in (400, 403, 415), f"{headers}: {status}")
        rebound = server.call("GET", "/v1/users/ann/export", headers={"Host": "evil.example"}).status_code
        verdict.expect(rebound in (400, 403), f"a foreign Host: {rebound}")
        verdict.expect(server.count() == 0, "items were planted")
        page = server.call("GET", "/docs").text
        verdict.expect(not re.search(r"(src|href)=[\"'](https?:)?//", page), "/docs loads from another site")
        verdict.expect(len(page) > 500, "/docs is blank")


@case("keys: made at once, taken away, badly named")
def keys(lab: Lab, verdict: Verdict) -> None:
    path = lab.scratch("keys") / "keys.json"
    with ThreadPoolExecutor(13) as pool:
        made = [pool.submit(lab.command, "create-key", f"t{n}", "--keys", path) for n in range(13)]
        printed = [each.result().stdout.strip() for each in made]
    with lab.serve("--keys", path, keys=False) as server:
        for number, key in enumerate(printed):
            answer = server.call("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            verdict.expect(answer.status_code == 200, f"key {number} of 13 does not work")
        lab.command("revoke-key", "t0", "--keys", path)
        verdict.expect(_stays_open(server, printed[0]) is False, "a revoked key still opens the server")
        answer = server.call("GET", "/v1/models", headers={"Authorization": f"Bearer {printed[1]}"})
        verdict.expect(answer.status_code == 200, "another key no longer works")
    for name in ("", " ", "a\nb", "x" * 10_000, "a\u202eb", "\ufffd"):
        refused = lab.command("create-key", name, "--keys", path, expect_success=False)
        is_clear = refused.returncode != 0 and "Traceback" not in refused.stderr
        verdict.expect(is_clear, f"a tenant of the name {name[:9]!r} is accepted")


def _stays_open(server: Server, key: str) -> bool:
    for _ in range(50):
        answer = server.call("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        if answer.status_code == 401:
            return False
        time.sleep(0.1)
    return True


@case("files that others on the machine can read")
def file_modes(lab: Lab, verdict: Verdict) -> None:
    place = lab.scratch("modes")
    with lab.serve("--keep-text", store=place / "histories.db") as server:
        server.add(lab.items(3)).raise_for_status()
        for path in sorted(place.iterdir()):
            mode = stat.S_IMODE(path.stat().st_mode)
            verdict.expect(not mode & 0o077, f"{path.name} has the mode {mode:o}")
