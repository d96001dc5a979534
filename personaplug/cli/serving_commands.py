"""The server commands: serve, create-key, revoke-key, erase-user, explain, refill-store, verify-receipt."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import click

from personaplug.cli.histories import histories_to_serve, load_into
from personaplug.cli.options import (
    FILE,
    engine_option,
    gguf_option,
    keep_pictures_option,
    keep_text_option,
    run_option,
    secret_option,
    seed_option,
)
from personaplug.cli.run_names import named_runs
from personaplug.config import MAX_PERSONA_SCALE
from personaplug.errors import ConfigError, MissingExtra, UserError

_COUNT = click.IntRange(1)
_STORE = click.option("--store", required=True, help="Store of histories: a file or a postgresql:// URL.")
_TENANT = click.option("--tenant", default="default", show_default=True, help="Tenant of the user.")
_USER = click.option("--user", required=True, help="Id of the user.")


class _NumberRange(click.FloatRange):
    """A range of numbers that also rejects NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


@click.command(context_settings={"show_default": True})
@run_option
@click.option(
    "--run-for",
    "further_runs",
    metavar="NAME=RUN",
    multiple=True,
    callback=named_runs,
    show_default=False,
    help="Also serve the plug of RUN, to requests whose `model` is NAME; may be repeated. Both plugs need the same "
    "language model and encoder. Requests without a `model` get the plug of --run.",
)
@click.option("--store", default="histories.db", help="Store of histories: a file or a postgresql:// URL.")
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
@engine_option
@gguf_option
@click.option("--engine-key", envvar="PERSONAPLUG_ENGINE_KEY", help="API key for the vLLM server, if it requires one.")
@click.option(
    "--model", default="", show_default=False, help="Name of the model in requests.  [default: the model's own name]"
)
@seed_option
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option(
    "--keys", type=FILE, help="File of API keys (`personaplug create-key`). Without it, only this machine can connect."
)
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    show_default=False,
    help="Origin of web pages that may call the server, such as https://app.example.org; may be repeated.",
)
@click.option(
    "--fallback",
    type=click.Choice(["population", "plain"]),
    default="population",
    help="Answers for users without a history: the population persona or the plain model.",
)
@click.option(
    "--persona-scale",
    default=1.0,
    type=_NumberRange(0, MAX_PERSONA_SCALE),
    help="Strength of personas if a request does not set it.",
)
@click.option(
    "--apply-off-task",
    is_flag=True,
    help="Also use personas for requests outside the task of the run.",
)
@keep_text_option
@keep_pictures_option
@click.option(
    "--copy-head",
    is_flag=True,
    help="Let the local engine copy tokens of the prompt and of the user's past answers into free text. The run needs "
    "a trained plug+copy-head; a new store then stores texts.",
)
@click.option(
    "--picture-threshold",
    type=_NumberRange(-1, 1),
    show_default="that of the encoder",
    help="Smallest cosine at which a picture in a question shows a concept of its user.",
)
@click.option(
    "--playground/--no-playground",
    "has_playground",
    default=None,
    show_default="only on a loopback address",
    help="Serve a page at / that compares two users and the plain model.",
)
@click.option("--max-items", type=int, help="Keep only the latest items of each user. The store saves this limit.")
@click.option("--max-days", type=int, help="Delete items older than this. The store saves this limit.")
@click.option(
    "--encoder-engine",
    default="auto",
    type=click.Choice(["torch", "openvino", "auto"]),
    help="Library that encodes questions; auto = OpenVINO if it is installed and the processor has bfloat16.",
)
@click.option("--max-rows", default=16, type=_COUNT, help="Batch size of the engines local and llamacpp.")
@click.option("--max-new-tokens", default=512, type=_COUNT, help="Maximum tokens of an answer of these engines.")
@click.option("--max-requests", default=256, type=_COUNT, help="Maximum concurrent requests; further ones get a 429.")
@click.option(
    "--max-body-mb", default=4.0, type=_NumberRange(0, 1024, min_open=True), help="Maximum size of a request body."
)
def serve(
    run_folder: Path,
    further_runs: dict[str, Path],
    sources: tuple[Path, ...],
    host: str,
    port: int,
    keys: Path | None,
    allow_origins: tuple[str, ...],
    has_playground: bool | None,
    max_requests: int,
    max_body_mb: float,
    max_items: int | None,
    max_days: int | None,
    **settings: Any,
) -> None:
    """Serve a run's plug with an OpenAI-compatible API: personalized chat and completions, and users' histories."""
    check_installed()
    from personaplug.serving.api_keys import OPEN_TENANT, ApiKeys, is_loopback
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
    plugs = {name: open_runs(folder) for name, folder in further_runs.items()}
    with bind(host, port) as listener:  # fail on a used port before the log is read and the models are loaded
        histories = histories_to_serve(sources, run_folder) if sources else {}
        service = open_service(run, config, others=others, plugs=plugs)
        if histories:
            load_into(service.store, OPEN_TENANT, histories)
        del histories  # with the temporary file of their pictures, which an erasure would not reach
        serve_service(
            service,
            api_keys=api_keys,
            limits=limits,
            host=host,
            port=port,
            listener=listener,
            allow_origins=origins,
            has_playground=is_loopback(host) if has_playground is None else has_playground,
        )


@click.command("create-key")
@click.argument("tenant")
@click.option("--keys", required=True, type=FILE, help="File of API keys; created if it does not exist.")
@click.option("--user", help="Create a key for this user only, for clients that cannot send a user name.")
def create_key(tenant: str, keys: Path, user: str | None) -> None:
    """Create an API key for TENANT and print it. The file stores only its hash, so the key is printed only once."""
    from personaplug.serving import api_keys

    click.echo(api_keys.create_key(keys, tenant, user=user))


@click.command("revoke-key")
@click.argument("name", metavar="TENANT_OR_KEY")
@click.option("--keys", required=True, type=FILE, help="File of API keys.")
def revoke_key(name: str, keys: Path) -> None:
    """Revoke a key, or all keys of a tenant. A running server rejects them within a second."""
    from personaplug.serving import api_keys

    click.echo(f"{api_keys.revoke_keys(keys, name)} keys revoked", err=True)


@click.command("erase-user")
@_STORE
@secret_option
@_TENANT
@_USER
def erase_user(store: str, secret: Path | None, tenant: str, user: str) -> None:
    """Erase a user from a store, down to the bytes in its files, and print the receipt."""
    check_installed()
    from personaplug.store.history_store import HistoryStore

    with closing(HistoryStore.open(store, secret=secret)) as opened:
        click.echo(json.dumps(opened.erase_user(tenant, user).to_dict(), indent=2))


@click.command()
@run_option
@seed_option
@click.option("--prompt", required=True, help="Prompt in the wording of the run's task.")
@click.option("--answer", help="Answer whose likelihood to compare with and without each item.")
@_STORE
@secret_option
@_TENANT
@_USER
@click.option("--most", default=10, show_default=True, help="Maximum items to list.")
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), help="First day for the drift of the persona.")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="Last day for the drift of the persona.")
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
    """Show how much each item contributes to a user's persona for a prompt, and to the likelihood of an answer."""
    check_installed()
    import asyncio

    from personaplug.serving.config import ServingConfig
    from personaplug.serving.explanations import Explainer
    from personaplug.serving.setup import open_service
    from personaplug.shared_run import open_runs

    if (since is None) != (until is None):
        raise ConfigError("--since and --until must be given together: the drift is between two days.")
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
@click.option("--from", "source", required=True, help="Store to copy; it must contain texts.")
@click.option("--to", "target", required=True, help="Store to create, or to complete after an interruption.")
@run_option
@seed_option
@secret_option
def refill_store(source: str, target: str, run_folder: Path, seed: int | None, secret: Path | None) -> None:
    """Copy a store of histories to a new store for the encoder of another run. Repeat the command to resume."""
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
@click.option("--store", required=True, help="Store that issued the receipt: a file or a postgresql:// URL.")
@secret_option
@click.option("--tenant", help="Also check that the user belonged to this tenant.")
@click.option("--user", help="Also check that the receipt is for this user.")
def verify_receipt(receipt: TextIO, store: str, secret: Path | None, tenant: str | None, user: str | None) -> None:
    """Verify a RECEIPT of an erasure (a JSON file, or - for standard input). The exit code is 1 if it is invalid."""
    check_installed()
    from personaplug.store.history_store import HistoryStore, Receipt

    try:
        values = json.load(receipt)
    except (ValueError, RecursionError) as error:
        raise UserError("The receipt is not JSON. Give the file exactly as `erase-user` printed it.") from error
    with closing(HistoryStore.open(store, secret=secret)) as opened:
        is_valid = opened.has_issued(Receipt.from_dict(values), tenant=tenant, user=user)
    click.echo("valid" if is_valid else "not valid: the store did not issue this receipt, or not for this user")
    if not is_valid:
        raise SystemExit(1)


def check_installed() -> None:
    packages = ("sqlalchemy", "cachetools", "fastapi", "uvicorn", "aiohttp", "prometheus_client", "opentelemetry")
    if not all(map(find_spec, packages)):
        raise MissingExtra("This command", extra="serve")
