"""The commands of a live service: serve, create-key, revoke-key, erase-user, explain, refill-store, verify-receipt."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import click

from personaplug.cli.histories import histories_to_serve, load_into
from personaplug.cli.options import FILE, run_option, secret_option, seed_option
from personaplug.config import MAX_PERSONA_SCALE
from personaplug.errors import ConfigError, MissingExtra, UserError

_COUNT = click.IntRange(1)
_STORE = click.option("--store", required=True, help="Histories: a file, or a postgresql:// URL.")
_TENANT = click.option("--tenant", default="default", show_default=True)
_USER = click.option("--user", required=True)


class _NumberRange(click.FloatRange):
    """A range of numbers; NaN, which is below and above nothing, is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


@click.command(context_settings={"show_default": True})
@run_option
@click.option("--store", default="histories.db", help="Histories: a file, or a postgresql:// URL.")
@click.option(
    "--load",
    "sources",
    metavar="LOG_OR_DATA",
    type=FILE,
    multiple=True,
    show_default=False,
    help="Load the histories of a log or a data folder first, as `load` does; stored items are skipped. For a log of "
    "several files, repeat it.",
)
@secret_option
@click.option("--engine", default="local", help="local, or the address of a vLLM server: http://…")
@click.option("--engine-key", envvar="PERSONAPLUG_ENGINE_KEY", help="Key of the vLLM server, if it asks for one.")
@click.option(
    "--model", default="", show_default=False, help="Name by which requests call the model.  [default: the model's own]"
)
@seed_option
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=8000, type=click.IntRange(0, 65535))
@click.option("--keys", type=FILE, help="File of keys (`personaplug create-key`). None: this machine only.")
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    show_default=False,
    help="Origin of a web page that may call the server from a browser, as https://app.example.org; may be repeated.",
)
@click.option(
    "--fallback",
    type=click.Choice(["population", "plain"]),
    default="population",
    help="What users without a history get: what is common to all, or the plain model.",
)
@click.option(
    "--persona-scale",
    default=1.0,
    type=_NumberRange(0, MAX_PERSONA_SCALE),
    help="Of personas, if a request does not say.",
)
@click.option(
    "--apply-off-task",
    is_flag=True,
    help="Use personas also for requests that do not ask what the run was trained for.",
)
@click.option("--keep-text", is_flag=True, help="Keep the items' texts, in a new store.")
@click.option(
    "--phrases", is_flag=True, help="Mix users' own phrases into the local engine's answers; a new store keeps texts."
)
@click.option("--max-items", type=int, help="Keep this many items of a user, the latest. The store remembers it.")
@click.option("--max-days", type=int, help="Keep items no older than this. The store remembers it.")
@click.option("--max-rows", default=16, type=_COUNT, help="Answers that the local engine generates at once.")
@click.option("--max-new-tokens", default=512, type=_COUNT, help="Longest answer of the local engine.")
@click.option("--max-requests", default=256, type=_COUNT, help="Requests at once; the next gets a 429.")
@click.option("--max-body-mb", default=4.0, type=_NumberRange(0, 1024, min_open=True), help="Longest request.")
def serve(
    run_folder: Path,
    sources: tuple[Path, ...],
    host: str,
    port: int,
    keys: Path | None,
    allow_origins: tuple[str, ...],
    max_requests: int,
    max_body_mb: float,
    max_items: int | None,
    max_days: int | None,
    **settings: Any,
) -> None:
    """Serve a run's plug behind OpenAI's API: chat and completions as a user, and the users' histories."""
    check_installed()
    from personaplug.serving.api_keys import OPEN_TENANT, ApiKeys
    from personaplug.serving.app import serve as serve_service
    from personaplug.serving.config import ServingConfig
    from personaplug.serving.listener import bind
    from personaplug.serving.middleware import RequestLimits
    from personaplug.serving.middleware.origins import check_origin
    from personaplug.serving.setup import open_service
    from personaplug.shared_run import open_runs
    from personaplug.store.history_store import Retention

    api_keys = ApiKeys.load(keys) if keys else ApiKeys()
    api_keys.check_address(host)
    origins = [check_origin(origin) for origin in allow_origins]
    retention = None if max_items is max_days is None else Retention(max_items, max_days)
    config = ServingConfig(retention=retention, **settings)
    limits = RequestLimits(body_bytes=int(max_body_mb * 2**20), requests=max_requests)
    if sources and keys:
        raise ConfigError(
            "With --keys, each history belongs to a tenant. Run `personaplug load --tenant TENANT` before `serve`, and "
            "leave --load out."
        )
    run, *others = open_runs(run_folder)
    with bind(host, port) as listener:  # before the log is read and the models are loaded
        histories = histories_to_serve(sources, run_folder) if sources else {}
        service = open_service(run, config, others=others)
        if histories:
            load_into(service.store, OPEN_TENANT, histories)
        serve_service(
            service,
            api_keys=api_keys,
            limits=limits,
            host=host,
            port=port,
            listener=listener,
            allow_origins=origins,
        )


@click.command("create-key")
@click.argument("tenant")
@click.option("--keys", required=True, type=FILE, help="File of keys; made if it does not exist.")
@click.option("--user", help="Make it the key of this user alone, for programs that can name no user.")
def create_key(tenant: str, keys: Path, user: str | None) -> None:
    """Create an API key for a TENANT and print it, once: the file holds its hash alone."""
    from personaplug.serving import api_keys

    click.echo(api_keys.create_key(keys, tenant, user=user))


@click.command("revoke-key")
@click.argument("name", metavar="TENANT_OR_KEY")
@click.option("--keys", required=True, type=FILE, help="File of keys.")
def revoke_key(name: str, keys: Path) -> None:
    """Revoke a key, or all keys of a tenant. A server that runs refuses them within a second."""
    from personaplug.serving import api_keys

    click.echo(f"{api_keys.revoke_keys(keys, name)} keys revoked", err=True)


@click.command("erase-user")
@_STORE
@secret_option
@_TENANT
@_USER
def erase_user(store: str, secret: Path | None, tenant: str, user: str) -> None:
    """Erase a user from a store, files included, and print the receipt."""
    check_installed()
    from personaplug.store.history_store import HistoryStore

    with closing(HistoryStore.open(store, secret=secret)) as opened:
        click.echo(json.dumps(opened.erase_user(tenant, user).to_dict(), indent=2))


@click.command()
@run_option
@seed_option
@click.option("--prompt", required=True, help="What is asked, in the wording of the run's task.")
@click.option("--answer", help="Whose likelihood is compared, with and without each item.")
@_STORE
@secret_option
@_TENANT
@_USER
@click.option("--most", default=10, show_default=True, help="Number of items to list.")
@click.option(
    "--since", type=click.DateTime(["%Y-%m-%d"]), help="With --until: how far the persona moved between the two days."
)
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]))
def explain(
    run_folder: Path,
    seed: int | None,
    prompt: str,
    answer: str | None,
    store: str,
    secret: Path | None,
    tenant: str,
    user: str,
    most: int,
    since: datetime | None,
    until: datetime | None,
) -> None:
    """Say which items made a user's persona for a prompt, and what an answer owes to each of them."""
    check_installed()
    import asyncio

    from personaplug.serving.config import ServingConfig
    from personaplug.serving.explanations import Explainer
    from personaplug.serving.setup import open_service
    from personaplug.shared_run import open_runs

    if (since is None) != (until is None):
        raise ConfigError("--since and --until go together: a persona moves between two days.")
    run, *others = open_runs(run_folder)
    config = ServingConfig(store=store, secret=secret, seed=seed, create=False)
    service = open_service(run, config, others=others)

    async def explained() -> dict[str, Any]:
        explainer = Explainer(service)
        await service.engine.start()
        try:
            explanation = await explainer.explain(tenant, user, prompt=prompt, answer=answer, most=most)
            if since and until:
                explanation["drift"] = await explainer.drift(tenant, user, since=since.date(), until=until.date())
            return explanation
        finally:
            await service.close()

    click.echo(json.dumps(asyncio.run(explained()), indent=2, ensure_ascii=False))


@click.command("refill-store")
@click.option("--from", "source", required=True, help="Store to copy; it must keep texts.")
@click.option("--to", "target", required=True, help="Store to create or to continue.")
@run_option
@seed_option
@secret_option
def refill_store(source: str, target: str, run_folder: Path, seed: int | None, secret: Path | None) -> None:
    """Copy a store of histories into a new one for the encoder of another run. Run it again to continue."""
    check_installed()
    from personaplug.infra.progress import Progress
    from personaplug.serving.persona_cache import store_settings
    from personaplug.serving.setup import open_parts
    from personaplug.shared_run import open_runs
    from personaplug.store.history_store import HistoryStore
    from personaplug.store.refill import open_target, refill

    encoder, load_plug = open_parts(open_runs(run_folder)[0], seed=seed)
    settings = store_settings(load_plug(None), keep_text=True)
    with (
        closing(HistoryStore.open(source, secret=secret)) as old,
        closing(open_target(old, target, encoder, settings=settings, save_secret=secret is None)) as new,
        Progress("refill", total=None, unit="users") as progress,
    ):
        count = refill(old, new, progress=progress.advance)
    click.echo(f"{count} users copied", err=True)


@click.command("verify-receipt")
@click.argument("receipt", type=click.File(encoding="utf-8"))
@click.option("--store", required=True, help="Store that issued it: a file, or a postgresql:// URL.")
@secret_option
@click.option("--tenant", help="Check also that the user was of this tenant.")
@click.option("--user", help="Check also that the receipt is about this user.")
def verify_receipt(receipt: TextIO, store: str, secret: Path | None, tenant: str | None, user: str | None) -> None:
    """Check a RECEIPT of an erasure (a JSON file, or - for standard input). The exit code is 1 if it is not valid."""
    check_installed()
    from personaplug.store.history_store import HistoryStore, Receipt

    try:
        values = json.load(receipt)
    except (ValueError, RecursionError) as error:
        raise UserError("The receipt is not JSON: give the file as the erasure printed it.") from error
    with closing(HistoryStore.open(store, secret=secret)) as opened:
        is_valid = opened.has_issued(Receipt.from_dict(values), tenant=tenant, user=user)
    click.echo("valid" if is_valid else "not valid: the store did not issue this receipt, or not for this user")
    if not is_valid:
        raise SystemExit(1)


def check_installed() -> None:
    if not all(map(find_spec, ("sqlalchemy", "cachetools", "fastapi", "uvicorn", "aiohttp", "prometheus_client"))):
        raise MissingExtra("A live service", extra="serve")
