"""Personas of live users: the same as an evaluation's, and never those of a history that has changed."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import ENCODER, LABELS, item

from personaplug.config import PlugConfig
from personaplug.data.records import Options
from personaplug.encoders import HashEncoder
from personaplug.errors import ConfigError, EncoderMismatch, StoreConflict
from personaplug.infra.model_hub import LLMIdentity
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.serving.persona_cache import PersonaCache, store_settings
from personaplug.store.history_store import HistoryStore, StoreSettings

LLM = LLMIdentity("small", None, "0123456789abcdef", 8)
BY_QUERY = replace(
    PlugConfig(), answer_channel="label", options="ignore", label_prior="own", instruction_start="random"
)
ALIKE = replace(BY_QUERY, aggregator="mean")
ITEMS = [item(str(n), f"film {n}", answer=LABELS[n % 3]) for n in range(5)]


def _plug(config: PlugConfig = ALIKE) -> PersonaPlug:
    torch.manual_seed(1)
    labels = LABELS if config.reads_labels or config.options == "compare" else ()
    plug = PersonaPlug(config, spec=PlugSpec(LLM, 0.25, ENCODER.identity, labels), encoder=ENCODER).eval()
    torch.nn.init.normal_(plug.population)
    return plug


def _live(tmp_path: Path, config: PlugConfig = ALIKE, **settings: Any) -> PersonaCache:
    plug = _plug(config)
    store = HistoryStore.open(tmp_path / "histories.db", ENCODER, settings=store_settings(plug))
    return PersonaCache(Personalizer(plug), store, **settings)


def _tokens(live: PersonaCache, user: str | None, query: str = "a film", **settings: Any) -> torch.Tensor:
    soft = live.persona("shop", user, query, **settings).soft
    assert soft is not None
    return soft.vectors


@pytest.mark.parametrize(
    "config",
    [
        ALIKE,
        BY_QUERY,
        replace(BY_QUERY, selected_items=2),
        *(replace(ALIKE, answer_channel=kind) for kind in ("text", "form")),
    ],
)
def test_it_is_the_persona_that_an_evaluation_makes(tmp_path: Path, config: PlugConfig) -> None:
    live = _live(tmp_path, config)
    live.store.add("shop", "ann", ITEMS)
    expected = Personalizer(live.plug).persona("a film", ITEMS, encoder=ENCODER)
    for _ in range(2):  # made, and then kept
        torch.testing.assert_close(_tokens(live, "ann"), expected.vectors)
    persona = live.persona("shop", "ann", "a film")
    assert persona.soft is not None
    assert expected.label_bias is not None
    assert expected.label_bias.any()
    torch.testing.assert_close(persona.soft.label_bias, expected.label_bias)
    assert (persona.applied, persona.items, persona.kept) == ("user", 5, True)


def test_a_query_is_asked_anew_though_the_history_is_kept(tmp_path: Path) -> None:
    live = _live(tmp_path, BY_QUERY)
    live.store.add("shop", "ann", ITEMS)
    assert not torch.equal(_tokens(live, "ann", "film 1"), _tokens(live, "ann", "film 2"))


@pytest.mark.parametrize("changes", [{}, {"selected_items": 2}, {"options": "compare"}])
def test_a_history_that_was_read_before_gives_the_same_tokens(tmp_path: Path, changes: dict[str, Any]) -> None:
    live = _live(tmp_path, replace(BY_QUERY, **changes))
    live.store.add("shop", "ann", ITEMS)
    options = Options("which", ("film 1", "film 2", "film 3"))
    history = live.store.load_history("shop", "ann", latest=10)
    for query in ("film 1", "film 2"):
        live.persona("shop", "ann", "another")
        persona = live.persona("shop", "ann", query, options=options)
        assert persona.soft is not None
        assert persona.kept
        assert torch.equal(persona.soft.vectors, live.made(query, history, options=options).vectors)


def test_options_reach_a_plug_that_compares_them(tmp_path: Path) -> None:
    live = _live(tmp_path, replace(ALIKE, options="compare"))
    live.store.add("shop", "ann", ITEMS)
    options = [Options("which", texts) for texts in (("film 1", "film 2", "film 3"), ("film 2", "film 1", "film 3"))]
    one, other = (_tokens(live, "ann", "which", options=each) for each in options)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("config", [ALIKE, BY_QUERY])
@pytest.mark.parametrize("user", [None, "nobody"])
def test_the_unknown_get_what_is_common_to_all_or_nothing(tmp_path: Path, config: PlugConfig, user: str | None) -> None:
    live = _live(tmp_path, config)
    population = Personalizer(live.plug).persona("a film", [], encoder=ENCODER)
    for persona_scale in (1.0, 0.5):
        torch.testing.assert_close(_tokens(live, user, persona_scale=persona_scale), population.vectors)
    assert live.persona("shop", user, "a film").applied == "population"
    plain = PersonaCache(Personalizer(live.plug), live.store, unknown="plain").persona("shop", user, "a film")
    assert (plain.soft, plain.applied) == (None, "plain")


@pytest.mark.parametrize("config", [ALIKE, BY_QUERY])
def test_strength_goes_from_the_plain_model_to_beyond(tmp_path: Path, config: PlugConfig) -> None:
    live = _live(tmp_path, config)
    live.store.add("shop", "ann", ITEMS)
    assert live.persona("shop", "ann", "a film", persona_scale=0).soft is None
    common, half, full, beyond = (
        _tokens(live, user, persona_scale=persona_scale)
        for user, persona_scale in ((None, 1.0), ("ann", 0.5), ("ann", 1.0), ("ann", 2.0))
    )
    torch.testing.assert_close(half, (common + full) / 2)
    torch.testing.assert_close(beyond, 2 * full - common)


@pytest.mark.parametrize("config", [ALIKE, BY_QUERY])
def test_a_change_is_seen_by_the_next_request(tmp_path: Path, config: PlugConfig) -> None:
    live, elsewhere = _live(tmp_path, config), HistoryStore.open(tmp_path / "histories.db", ENCODER)
    elsewhere.add("shop", "ann", ITEMS[:2])
    before = _tokens(live, "ann")
    elsewhere.add("shop", "ann", ITEMS[2:])  # as another process would: nobody tells `live`
    persona = live.persona("shop", "ann", "a film")
    assert (persona.items, persona.kept) == (5, False)
    assert not torch.equal(before, _tokens(live, "ann"))
    elsewhere.erase_user("shop", "ann")
    assert live.persona("shop", "ann", "a film").applied == "population"
    assert live.kept_users == 0
    elsewhere.add("shop", "ann", ITEMS[:2])
    assert live.persona("shop", "ann", "a film").items == 2


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    live = _live(tmp_path, cache_bytes=5_000)
    for user in map(str, range(20)):
        live.store.add("shop", user, ITEMS[:1])
        live.persona("shop", user, "a film")
    assert 1 <= live.kept_users < 5
    assert live.kept_bytes <= 5_000
    assert _live(tmp_path, cache_bytes=100).persona("shop", "3", "a film").applied == "user"


def test_forgetting_while_somebody_reads_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = _live(tmp_path)
    live.store.add("shop", "ann", ITEMS)
    load_history = live.store.load_history

    def read_then_erased(*given: Any, **named: Any) -> Any:
        history = load_history(*given, **named)
        live.store.erase_user("shop", "ann")
        live.forget("shop", "ann")
        return history

    monkeypatch.setattr(live.store, "load_history", read_then_erased)
    live.persona("shop", "ann", "a film")
    assert live.kept_users == 0


def test_no_persona_crosses_to_another_user_or_tenant(tmp_path: Path) -> None:
    """Users with one item each, which tells them apart, asked for at random by several threads while others write."""
    live = _live(tmp_path, cache_bytes=60_000)  # some come and go
    answers = Personalizer(live.plug)
    expected = {}
    for number in range(60):
        tenant, user = f"tenant {number % 3}", f"user {number // 3}"  # the same names in every tenant
        own = item("only", f"likes number {number}", answer=LABELS[number % 3])
        live.store.add(tenant, user, [own])
        expected[tenant, user] = answers.persona("a film", [own], encoder=ENCODER).vectors
    crossed: list[tuple[str, str]] = []

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(400):
            tenant, user = draw.choice(list(expected))
            soft = live.persona(tenant, user, "a film").soft
            if soft is None or not torch.allclose(soft.vectors, expected[tenant, user], atol=1e-5):
                crossed.append((tenant, user))
            if draw.random() < 0.05:
                live.forget(tenant, user)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not crossed


def test_stores_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plug = _plug()
    for number, settings in enumerate((StoreSettings(labels=LABELS), StoreSettings(("a", "b"), encodes_answers=False))):
        store = HistoryStore.open(tmp_path / f"{number}.db", ENCODER, settings=settings)
        with pytest.raises(StoreConflict, match="store_settings"):
            PersonaCache(Personalizer(plug), store)
    other = HistoryStore.open(tmp_path / "other.db", HashEncoder(64), settings=store_settings(plug))
    with pytest.raises(EncoderMismatch):
        PersonaCache(Personalizer(plug), other)
    with pytest.raises(ConfigError, match="population, plain"):
        _live(tmp_path, unknown="default")


def test_users_of_few_items_are_told_to_have_what_is_common(tmp_path: Path) -> None:
    live = _live(tmp_path)
    live.plug.set_cold_start(torch.ones_like(live.plug.common().vectors[0]), items=2)
    applied = []
    for one in ITEMS[:3]:
        live.store.add("shop", "ann", [one])
        applied.append(live.persona("shop", "ann", "a film").applied)
        weights = live.weights("a film", live.personalizer.encoded(ITEMS[: len(applied)], encoder=ENCODER))
        assert bool(weights.any()) == (applied[-1] == "user")
    assert applied == ["population", "population", "user"]
    assert not torch.equal(_tokens(live, "ann"), _tokens(live, None))
