"""Personas of live users equal those of an evaluation, and never come from an outdated history."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import ENCODER, LABELS, add, item

from personaplug.config import PlugConfig
from personaplug.data.records import HistoryItem, Options
from personaplug.encoders import HashEncoder
from personaplug.errors import ConfigError, EncoderMismatch, StoreConflict, UserErased
from personaplug.infra.model_hub import LLMIdentity
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.attribution import item_weights
from personaplug.plug.layers import ColdStart
from personaplug.plug.model import PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec
from personaplug.serving.persona_cache import Persona, PersonaCache, store_settings
from personaplug.store.history_store import HistoryStore, StoreSettings

LLM = LLMIdentity("small", None, "0123456789abcdef", 8)
QUERY_DEPENDENT = replace(
    PlugConfig(), answer_channel="label", options="ignore", label_prior="counts", instruction_start="random"
)
QUERY_INDEPENDENT = replace(QUERY_DEPENDENT, state_tokens=4)
ITEMS = [item(str(n), f"film {n}", answer=LABELS[n % 3]) for n in range(5)]


def _plug(config: PlugConfig = QUERY_INDEPENDENT) -> PersonaPlug:
    torch.manual_seed(1)
    labels = LABELS if config.reads_labels or config.options == "compare" else ()
    plug = PersonaPlug(config, spec=PlugSpec(LLM, 0.25, ENCODER.identity, labels), encoder=ENCODER).eval()
    assert plug.persona is not None
    torch.nn.init.normal_(plug.persona.population)
    return plug


def _open_cache(tmp_path: Path, config: PlugConfig = QUERY_INDEPENDENT, **settings: Any) -> PersonaCache:
    plug = _plug(config)
    store = HistoryStore.open(tmp_path / "histories.db", ENCODER, settings=store_settings(plug))
    return PersonaCache(Personalizer(plug), store, **settings)


def _persona(plug: PersonaPlug, items: Sequence[HistoryItem]) -> SoftPrompt:
    """Return the soft prompt that an evaluation computes."""
    personalizer = Personalizer(plug)
    return personalizer.persona("a film", personalizer.encode(items, encoder=ENCODER))


def _ask(cache: PersonaCache, tenant: str, user: str | None, *, query: str, **settings: Any) -> Persona:
    ticket = cache.store.admit(tenant, user) if user is not None else None
    return cache.persona(ticket, query=query, **settings)


def _tokens(cache: PersonaCache, user: str | None, query: str = "a film", **settings: Any) -> torch.Tensor:
    soft = _ask(cache, "shop", user, query=query, **settings).soft
    assert soft is not None
    return soft.vectors


@pytest.mark.parametrize(
    "config",
    [
        QUERY_INDEPENDENT,
        QUERY_DEPENDENT,
        replace(QUERY_INDEPENDENT, answer_channel="text"),
        replace(QUERY_INDEPENDENT, answer_channel="style"),
    ],
)
def test_persona_equals_the_one_of_an_evaluation(tmp_path: Path, config: PlugConfig) -> None:
    cache = _open_cache(tmp_path, config)
    add(cache.store, "shop", "ann", ITEMS)
    expected = _persona(cache.plug, ITEMS)
    for _ in range(2):  # computed, then cached
        torch.testing.assert_close(_tokens(cache, "ann"), expected.vectors)
    persona = _ask(cache, "shop", "ann", query="a film")
    assert persona.soft is not None
    assert expected.label_bias is not None
    assert expected.label_bias.any()
    torch.testing.assert_close(persona.soft.label_bias, expected.label_bias)
    assert (persona.applied, persona.items, persona.cached) == ("user", 5, True)


def test_cached_history_still_depends_on_the_query(tmp_path: Path) -> None:
    cache = _open_cache(tmp_path, QUERY_DEPENDENT)
    add(cache.store, "shop", "ann", ITEMS)
    assert not torch.equal(_tokens(cache, "ann", "film 1"), _tokens(cache, "ann", "film 2"))


@pytest.mark.parametrize("changes", [{}, {"options": "compare"}])
def test_cached_history_gives_the_same_tokens(tmp_path: Path, changes: dict[str, Any]) -> None:
    cache = _open_cache(tmp_path, replace(QUERY_DEPENDENT, **changes))
    add(cache.store, "shop", "ann", ITEMS)
    options = Options("which", ("film 1", "film 2", "film 3"))
    history = cache.store.load_history("shop", "ann", latest=10)
    for query in ("film 1", "film 2"):
        _ask(cache, "shop", "ann", query="another")
        persona = _ask(cache, "shop", "ann", query=query, options=options)
        assert persona.soft is not None
        assert persona.cached
        assert torch.equal(persona.soft.vectors, cache.personalizer.persona(query, history, options=options).vectors)


def test_options_reach_a_plug_that_compares_options(tmp_path: Path) -> None:
    cache = _open_cache(tmp_path, replace(QUERY_INDEPENDENT, options="compare"))
    add(cache.store, "shop", "ann", ITEMS)
    options = [Options("which", texts) for texts in (("film 1", "film 2", "film 3"), ("film 2", "film 1", "film 3"))]
    first, second = (_tokens(cache, "ann", "which", options=each) for each in options)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("config", [QUERY_INDEPENDENT, QUERY_DEPENDENT])
@pytest.mark.parametrize("user", [None, "nobody"])
def test_user_without_history_gets_the_fallback(tmp_path: Path, config: PlugConfig, user: str | None) -> None:
    cache = _open_cache(tmp_path, config)
    population = _persona(cache.plug, [])
    for persona_scale in (1.0, 0.5):
        torch.testing.assert_close(_tokens(cache, user, persona_scale=persona_scale), population.vectors)
    assert _ask(cache, "shop", user, query="a film").applied == "population"
    plain = _ask(PersonaCache(Personalizer(cache.plug), cache.store, fallback="plain"), "shop", user, query="a film")
    assert (plain.soft, plain.applied) == (None, "plain")


@pytest.mark.parametrize("config", [QUERY_INDEPENDENT, QUERY_DEPENDENT])
def test_persona_scale_interpolates_and_extrapolates(tmp_path: Path, config: PlugConfig) -> None:
    cache = _open_cache(tmp_path, config)
    add(cache.store, "shop", "ann", ITEMS)
    assert _ask(cache, "shop", "ann", query="a film", persona_scale=0).soft is None
    common, half, full, beyond = (
        _tokens(cache, user, persona_scale=persona_scale)
        for user, persona_scale in ((None, 1.0), ("ann", 0.5), ("ann", 1.0), ("ann", 2.0))
    )
    torch.testing.assert_close(half, (common + full) / 2)
    torch.testing.assert_close(beyond, 2 * full - common)


@pytest.mark.parametrize("config", [QUERY_INDEPENDENT, QUERY_DEPENDENT])
def test_change_by_another_process_is_seen_by_the_next_request(tmp_path: Path, config: PlugConfig) -> None:
    cache, other_store = _open_cache(tmp_path, config), HistoryStore.open(tmp_path / "histories.db", ENCODER)
    add(other_store, "shop", "ann", ITEMS[:2])
    before = _tokens(cache, "ann")
    add(other_store, "shop", "ann", ITEMS[2:])  # like another process, which does not notify `cache`
    persona = _ask(cache, "shop", "ann", query="a film")
    assert (persona.items, persona.cached) == (5, False)
    assert not torch.equal(before, _tokens(cache, "ann"))
    other_store.erase_user("shop", "ann")
    assert _ask(cache, "shop", "ann", query="a film").applied == "population"
    assert cache.cached_users == 0
    add(other_store, "shop", "ann", ITEMS[:2])
    assert _ask(cache, "shop", "ann", query="a film").items == 2


def test_cache_size_is_limited(tmp_path: Path) -> None:
    cache = _open_cache(tmp_path, cache_bytes=5_000)
    for user in map(str, range(20)):
        add(cache.store, "shop", user, ITEMS[:1])
        _ask(cache, "shop", user, query="a film")
    assert 1 <= cache.cached_users < 5
    assert cache.cached_bytes <= 5_000
    assert _ask(_open_cache(tmp_path, cache_bytes=100), "shop", "3", query="a film").applied == "user"


def test_erasure_during_a_lookup_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _open_cache(tmp_path)
    add(cache.store, "shop", "ann", ITEMS)
    load_history = cache.store.load_history

    def read_then_erased(*args: Any, **kwargs: Any) -> Any:
        history = load_history(*args, **kwargs)
        cache.store.erase_user("shop", "ann")
        cache.forget("shop", "ann")
        return history

    monkeypatch.setattr(cache.store, "load_history", read_then_erased)
    with pytest.raises(UserErased):
        _ask(cache, "shop", "ann", query="a film")
    assert cache.cached_users == 0


def test_concurrent_threads_get_their_own_users_personas(tmp_path: Path) -> None:
    """Several threads request personas of random users, each with one distinctive item, while entries are dropped."""
    cache = _open_cache(tmp_path, cache_bytes=60_000)  # small, so it evicts entries
    expected = {}
    for number in range(60):
        tenant, user = f"tenant {number % 3}", f"user {number // 3}"  # the same names in every tenant
        only_item = item("only", f"likes number {number}", answer=LABELS[number % 3])
        add(cache.store, tenant, user, [only_item])
        expected[tenant, user] = _persona(cache.plug, [only_item]).vectors
    mismatches: list[tuple[str, str]] = []

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(400):
            tenant, user = draw.choice(list(expected))
            soft = _ask(cache, tenant, user, query="a film").soft
            if soft is None or not torch.allclose(soft.vectors, expected[tenant, user], atol=1e-5):
                mismatches.append((tenant, user))
            if draw.random() < 0.05:
                cache.forget(tenant, user)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mismatches


def test_store_that_does_not_fit_the_plug_is_refused(tmp_path: Path) -> None:
    plug = _plug()
    for number, settings in enumerate((StoreSettings(labels=LABELS), StoreSettings(("a", "b"), encodes_answers=False))):
        store = HistoryStore.open(tmp_path / f"{number}.db", ENCODER, settings=settings)
        with pytest.raises(StoreConflict, match="store_settings"):
            PersonaCache(Personalizer(plug), store)
    other = HistoryStore.open(tmp_path / "other.db", HashEncoder(64), settings=store_settings(plug))
    with pytest.raises(EncoderMismatch):
        PersonaCache(Personalizer(plug), other)
    with pytest.raises(ConfigError, match="population, plain"):
        _open_cache(tmp_path, fallback="default")


def test_user_with_few_items_gets_the_population_persona(tmp_path: Path) -> None:
    cache = _open_cache(tmp_path)
    cache.plug.cold_start = ColdStart(torch.ones_like(cache.plug.population_prompt().vectors[0]), max_items=2)
    applied = []
    for new_item in ITEMS[:3]:
        add(cache.store, "shop", "ann", [new_item])
        applied.append(_ask(cache, "shop", "ann", query="a film").applied)
        weights = item_weights(
            cache.personalizer, "a film", cache.personalizer.encode(ITEMS[: len(applied)], encoder=ENCODER)
        )
        assert bool(weights.any()) == (applied[-1] == "user")
    assert applied == ["population", "population", "user"]
    assert not torch.equal(_tokens(cache, "ann"), _tokens(cache, None))


def test_items_of_a_user_without_persona_act_through_the_label_prior(tmp_path: Path) -> None:
    cache, tokens = _open_cache(tmp_path, QUERY_DEPENDENT), torch.ones(8, 8)
    cache.plug.cold_start = ColdStart(tokens, max_items=512, prior_numbers=torch.ones(2))
    assert _ask(cache, "shop", None, query="a film").applied == "population"
    add(cache.store, "shop", "ann", ITEMS)
    for _ in range(2):  # computed, then cached
        persona = _ask(cache, "shop", "ann", query="a film")
        assert persona.applied == "user"
        assert persona.soft is not None
        assert persona.soft.label_bias is not None
        assert torch.equal(persona.soft.vectors[0], tokens * cache.plug.spec.embedding_scale)
        torch.testing.assert_close(persona.soft.label_bias, _persona(cache.plug, ITEMS).label_bias)
        assert persona.soft.label_bias.any()
