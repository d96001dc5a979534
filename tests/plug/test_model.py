"""The plug against the paper's equations in numpy, and what is kept of it on disk."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf

from personaplug.config import PAPER
from personaplug.data.records import Options
from personaplug.encoders import HashEncoder, QueryEncoder
from personaplug.encoders.encoded_sample import EncodedHistory, no_style
from personaplug.encoders.style_features import style_features_of
from personaplug.errors import ConfigError, EncoderMismatch, LLMMismatch, MissingData
from personaplug.infra.model_hub import LLMIdentity
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.attribution import drift
from personaplug.plug.layers import FrozenQueries, OptionHint, per_user
from personaplug.plug.model import HistoryBatch, PersonaPlug
from personaplug.plug.personalizer import Personalizer
from personaplug.plug.saving import PlugSpec, read_plug_config
from personaplug.training.parts import INSTRUCTION

WIDTH, OUT = 16, 8
LLM = LLMIdentity("small", None, "0123456789abcdef", OUT)
QUERIES = ["who likes films", "a long walk", "tea"]


def _plug(encoder: HashEncoder | None = None, *, labels: tuple[str, ...] = (), **settings: Any) -> PersonaPlug:
    encoder = encoder or HashEncoder(WIDTH)
    torch.manual_seed(1)
    spec = PlugSpec(LLM, 0.25, encoder.identity, labels)
    return PersonaPlug(replace(PAPER, **settings), spec=spec, encoder=encoder).eval()


def _history(*, lengths: tuple[int, ...] = (4, 2, 0)) -> HistoryBatch:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(sum(lengths), WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    answers = rng.integers(0, 3, size=sum(lengths))
    forms = style_features_of("word " * n for n in rng.integers(1, 9, size=sum(lengths)))
    return HistoryBatch(torch.from_numpy(vectors), lengths, torch.from_numpy(answers), torch.from_numpy(forms))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_persona_is_that_of_the_papers_equations(tokens: int, temperature: float) -> None:
    plug = _plug(persona_tokens=tokens, temperature=temperature)
    encoder, history = HashEncoder(WIDTH), _history(lengths=(4, 2))
    inner, outer = plug.projector.inner, plug.projector.outer
    got = plug(QUERIES[:2], history).vectors.detach().numpy()
    for row in range(2):
        x = encoder.encode([QUERIES[row]])[0]  # eq. 2; the trained copy starts as the frozen encoder
        h = per_user(history.vectors, (4, 2))[row].numpy()  # eq. 1
        w = np.exp(h @ x / temperature)
        w /= w.sum()  # eq. 3
        z = (h * np.sqrt(WIDTH)) @ inner.weight.detach().numpy().T + inner.bias.detach().numpy()
        z = z * (1 + erf(z / np.sqrt(2))) / 2
        projected = z @ outer.weight.detach().numpy().T + outer.bias.detach().numpy()
        persona = (w @ projected).reshape(tokens, OUT)  # eq. 4
        expected = 0.25 * np.concatenate([plug.instruction.detach().numpy(), persona])  # [I; P] of eq. 5
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


def test_soft_tokens_start_at_the_size_of_the_models_own() -> None:
    encoder = HashEncoder(256)
    wide = LLMIdentity("wide", None, "0" * 16, 512)
    torch.manual_seed(0)
    plug = PersonaPlug(PAPER, spec=PlugSpec(wide, 0.13, encoder.identity), encoder=encoder)
    one = HistoryBatch(
        torch.from_numpy(encoder.encode(["an item"])), (1,), torch.tensor([-1]), torch.from_numpy(no_style(1))
    )
    size = plug(["x"], one).vectors.pow(2).mean(dim=-1).sqrt()
    assert size[0, 0].item() == pytest.approx(0.13, rel=0.2)
    assert size[0, 1].item() == pytest.approx(0.13, rel=0.2)


def test_neighbours_in_a_batch_change_nothing() -> None:
    plug, history = _plug(), _history()
    together = plug(QUERIES, history).vectors
    parts = (history.vectors, history.answers, history.forms)
    rows = zip(*(per_user(part, (4, 2, 0)) for part in parts), strict=True)
    for place, (vectors, answers, forms) in enumerate(rows):
        alone = plug(QUERIES[place : place + 1], HistoryBatch(vectors, (len(vectors),), answers, forms)).vectors
        torch.testing.assert_close(together[place : place + 1], alone)


def test_items_in_bfloat16_give_nearly_the_same_persona() -> None:
    plug, history = _plug(), _history()
    exact = plug(QUERIES, history).vectors
    assert plug.computing_items_in("float16").item_dtype == torch.float32
    rough = plug.computing_items_in("bfloat16")(QUERIES, history).vectors
    halves = replace(history, vectors=history.vectors.half())  # as a table has them
    torch.testing.assert_close(plug(QUERIES, halves).vectors, rough, atol=0.01, rtol=0.01)
    torch.testing.assert_close(plug.weights(QUERIES, halves), plug.weights(QUERIES, history), atol=1e-3, rtol=1e-3)
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.02, rtol=0.02)


def test_a_query_that_rows_share_is_encoded_once_and_a_frozen_one_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plug = _plug(query_encoder="head")
    asked: list[list[str]] = []
    encode = QueryEncoder.encode

    def noted(encoder: QueryEncoder, texts: list[str]) -> Any:
        asked.append(texts)
        return encode(encoder, texts)

    monkeypatch.setattr(QueryEncoder, "encode", noted)
    first = plug(["tea", "milk", "tea"], _history()).vectors
    again = plug(["tea", "milk", "tea"], _history()).vectors
    assert asked == [["tea", "milk"]]
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", ["trained", "head"])
def test_a_plug_that_weighs_all_items_alike_has_no_query_side(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashEncoder, "query_encoder", lambda _: pytest.fail("a query side was made"))
    plug, history = _plug(aggregator="mean", query_encoder=kind), _history()
    assert plug.query_encoder is None
    assert not any(name.startswith("query_encoder") for name in plug.state_dict())
    plug.remember(QUERIES)
    assert torch.equal(plug(QUERIES, history).vectors, plug(QUERIES[::-1], history).vectors)
    assert plug.weights(QUERIES, history).tolist() == [0.25] * 4 + [0.5] * 2


def test_a_user_without_history_gets_the_population_persona_and_trains_it() -> None:
    plug = _plug()
    soft = plug(QUERIES, _history(lengths=(4, 2, 0))).vectors
    assert torch.isfinite(soft).all()
    torch.testing.assert_close(soft[2, 1:], plug.population * 0.25)
    soft.sum().backward()
    assert plug.population.grad is not None
    assert plug.population.grad.abs().sum() > 0  # zero at first, and not for long
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in plug.parameters())


def test_tokens_for_a_cold_start_serve_users_of_few_items_alone(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    plug, history = _plug(encoder), _history(lengths=(4, 2, 0))
    before = plug(QUERIES, history).vectors
    tokens = torch.full_like(before[0], 2.0)
    plug.set_cold_start(tokens, items=2)
    assert (plug.few, torch.equal(plug(QUERIES, history).vectors[0], before[0])) == (2, True)
    assert torch.equal(plug(QUERIES, history).vectors[1], tokens * plug.spec.embedding_scale)
    plug.save_pretrained(tmp_path)
    again = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    assert torch.equal(again(QUERIES, history).vectors, plug(QUERIES, history).vectors)
    plug.set_cold_start(tokens)
    after = plug(QUERIES, history).vectors
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[2], torch.full_like(before[2], 2.0) * plug.spec.embedding_scale)
    assert torch.equal(plug(QUERIES, history, persona_scale=0.5).vectors[2], after[2])
    assert plug(QUERIES, history, persona_scale=0).vectors.shape[1] == 0
    torch.testing.assert_close(plug.common().vectors[0], before[2])
    plug.save_pretrained(tmp_path)
    again = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    assert torch.equal(again(QUERIES, history).vectors, after)
    plug.set_cold_start(tokens[:1])
    plug.save_pretrained(tmp_path)
    with pytest.raises(MissingData, match="cold_start should be of the shape"):
        PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)


def test_users_of_few_items_may_be_served_as_if_they_had_none(tmp_path: Path) -> None:
    encoder, labels = HashEncoder(WIDTH), ("1", "2", "3")
    settings: dict[str, Any] = {
        "label_prior": "own",
        "options": "compare",
        "shrinkage": True,
        "answer_channel": "label",
    }
    plug, history = _plug(encoder, labels=labels, **settings), _history(lengths=(4, 2, 0))
    assert plug.hint is not None
    with torch.no_grad():
        for value in (plug.population, *plug.hint.parameters()):
            value.normal_()
    options = [Options("which?", ("tea", "coffee", "milk"))] * 3
    own, none = plug(QUERIES, history, options=options), plug(QUERIES, _history(lengths=(0, 0, 0)), options=options)
    plug.set_cold_start(None, items=2)
    plug.save_pretrained(tmp_path)
    again = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    for one, read in ((plug, history), (plug, plug.read(history)), (again, history)):
        served = one(QUERIES, read, options=options)
        assert one.few == 2
        torch.testing.assert_close(served.vectors[0], own.vectors[0])
        torch.testing.assert_close(served.vectors[1:], none.vectors[1:])
        torch.testing.assert_close(served.label_bias[0], own.label_bias[0])
        assert not served.label_bias[1:].any()
    assert not torch.equal(own.vectors[1], none.vectors[1])
    halved = plug(QUERIES, history, options=options, persona_scale=0.5).vectors
    torch.testing.assert_close(halved[1:], none.vectors[1:])
    plug.set_cold_start(None)
    assert (plug.few, torch.equal(plug(QUERIES, history, options=options).vectors, own.vectors)) == (0, True)


def test_what_the_users_own_answers_say_of_the_labels_goes_with_the_tokens(tmp_path: Path) -> None:
    encoder, labels = HashEncoder(WIDTH), ("1", "2", "3")
    plug, history = _plug(encoder, labels=labels, label_prior="own"), _history(lengths=(4, 2, 0))
    assert plug.label_prior is not None
    plug.label_prior.start_from(torch.tensor([0, 0, 1, 2]))
    bias = plug(QUERIES, history).label_bias
    torch.testing.assert_close(bias, plug.label_prior(history.answers, history.lengths))
    assert bias[:2].any(dim=1).all()
    assert not bias[2].any()  # nobody's answers say nothing
    torch.testing.assert_close(plug(QUERIES, history, persona_scale=0.5).label_bias, bias / 2)
    assert plug(QUERIES, history, persona_scale=0).label_bias is None
    assert plug.common().label_bias is None
    plug.set_cold_start(torch.zeros_like(plug(QUERIES, history).vectors[0]), items=2)
    served = plug(QUERIES, history).label_bias
    torch.testing.assert_close(served[0], bias[0])
    assert not served[1:].any()  # who gets what is common to all gets nothing of their own
    plug.save_pretrained(tmp_path)
    again = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    torch.testing.assert_close(again(QUERIES, history).label_bias, served)


def test_a_plug_from_before_there_was_a_label_prior_has_none(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    plug = _plug(encoder, labels=("1", "2", "3"))
    plug.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "plug.json").read_text())
    del about["config"]["label_prior"]
    (tmp_path / "plug.json").write_text(json.dumps(about))
    again = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    assert again(QUERIES, _history()).label_bias is None


def test_how_far_a_persona_moved_does_not_depend_on_what_a_cold_start_is_served_with() -> None:
    plug = _plug()

    def make(history: EncodedHistory) -> SoftPrompt:
        return Personalizer(plug).of_history("x", history)

    rng = np.random.default_rng(0)
    none = np.full(3, -1, dtype=np.int16)
    one, other = (rng.normal(size=(3, WIDTH)).astype(np.float16) for _ in range(2))
    before, after = EncodedHistory(one, none, no_style(3)), EncodedHistory(other, none, no_style(3))
    found = drift(make, before, after, common=plug.common())
    start = drift(make, before.only(slice(0)), after, common=plug.common())
    plug.set_cold_start(torch.full_like(plug.common().vectors[0], 9.0))
    assert drift(make, before, after, common=plug.common()) == found
    again = drift(make, before.only(slice(0)), after, common=plug.common())
    assert (again.cosine, start.cosine, math.isnan(again.moved)) == (0.0, 0.0, True)


def test_a_batch_of_new_users_only_has_finite_gradients() -> None:
    plug = _plug()
    empty = _history(lengths=(0, 0, 0))
    plug(QUERIES, empty).vectors.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in plug.parameters())


def test_the_order_of_items_does_not_matter_to_eq_3_and_4() -> None:
    plug, history = _plug(), _history(lengths=(4, 4, 4))
    parts = (history.vectors, history.answers, history.forms)
    vectors, answers, forms = (torch.cat([own.flip(0) for own in per_user(part, history.lengths)]) for part in parts)
    turned = HistoryBatch(vectors, history.lengths, answers, forms)
    torch.testing.assert_close(plug(QUERIES, history).vectors, plug(QUERIES, turned).vectors)


def test_answers_are_a_channel_of_their_own_where_asked_for() -> None:
    plug, history = _plug(answer_channel="label", labels=("1", "2", "3")), _history(lengths=(4, 4, 4))
    other = replace(history, answers=(history.answers + 1) % 3)
    assert not torch.allclose(plug(QUERIES, history).vectors, plug(QUERIES, other).vectors)
    deaf = _plug(answer_channel="text")
    assert torch.equal(deaf(QUERIES, history).vectors, deaf(QUERIES, other).vectors)


def test_the_form_of_answers_is_a_channel_where_asked_for() -> None:
    plug, history = _plug(answer_channel="style"), _history(lengths=(4, 4, 4))
    other = replace(history, forms=history.forms + 1)
    assert not torch.allclose(plug(QUERIES, history).vectors, plug(QUERIES, other).vectors)
    deaf = _plug(answer_channel="text")
    assert torch.equal(deaf(QUERIES, history).vectors, deaf(QUERIES, other).vectors)


@pytest.mark.parametrize("aggregator", ["dot", "mean"])
def test_with_shrinkage_every_item_leaves_less_to_what_is_common(aggregator: str) -> None:
    plug = _plug(shrinkage=True, aggregator=aggregator)
    own = _history(lengths=(12,))
    left = []
    for items in range(13):
        part = HistoryBatch(own.vectors[:items], (items,), own.answers[:items], own.forms[:items])
        left.append(1 - plug.weights(QUERIES[:1], part).sum().item())
    assert left[0] == 1
    assert all(more > less > 0 for more, less in pairwise(left))
    if aggregator == "mean":  # e^1 against as many e^0 as there are items
        assert left[5] == pytest.approx(math.e / (math.e + 5))


@pytest.mark.parametrize("shrinkage", [False, True])
def test_the_users_state_is_made_of_all_items_alike_and_the_rest_for_the_query(shrinkage: bool) -> None:
    plug, history = _plug(persona_tokens=3, state_tokens=2, temperature=0.1, shrinkage=shrinkage), _history()
    torch.nn.init.normal_(plug.population)
    state, asked = (
        _plug(persona_tokens=3, aggregator=kind, temperature=0.1, shrinkage=shrinkage) for kind in ("mean", "dot")
    )
    for other in (state, asked):
        other.load_state_dict({name: value for name, value in plug.state_dict().items() if name in other.state_dict()})
    found = plug.persona(QUERIES, history)
    torch.testing.assert_close(found[:, :2], state.persona(QUERIES, history)[:, :2])
    torch.testing.assert_close(found[:, 2:], asked.persona(QUERIES, history)[:, 2:])
    moved = plug.persona(QUERIES[1:] + QUERIES[:1], history)
    torch.testing.assert_close(moved[:, :2], found[:, :2])
    assert not torch.allclose(moved[:2, 2:], found[:2, 2:])
    mixed = (2 * state.weights(QUERIES, history) + asked.weights(QUERIES, history)) / 3
    torch.testing.assert_close(plug.weights(QUERIES, history), mixed)


def test_some_tokens_are_left_for_the_query() -> None:
    with pytest.raises(ConfigError, match="aggregator=mean"):
        _plug(persona_tokens=2, state_tokens=2)
    assert _plug(persona_tokens=2, state_tokens=2, aggregator="mean").ignores_query
    assert not _plug(persona_tokens=0, state_tokens=2).config.persona_tokens


def test_a_setting_that_has_gone_is_no_hindrance() -> None:
    assert read_plug_config({"heads": 4, "aggregator": "dot"}).aggregator == "dot"
    with pytest.raises(ConfigError, match="dot, mean"):
        read_plug_config({"heads": 4, "aggregator": "heads"})


def test_shrinkage_mixes_the_common_persona_into_that_of_the_items() -> None:
    plug, history = _plug(shrinkage=True), _history(lengths=(4, 2, 0))
    torch.nn.init.normal_(plug.population)
    with torch.no_grad():
        weights = plug.weights(QUERIES, history)
        hidden = plug.projector.hidden(history.vectors, answers=history.answers, forms=history.forms)
        each = torch.nn.functional.linear(hidden, plug.projector.outer.weight, plug.projector.outer.bias)
        found = plug.persona(QUERIES, history)[:, 0]
    for row, items in enumerate((slice(0, 4), slice(4, 6), slice(6, 6))):
        share = weights[items].sum()
        expected = weights[items] @ each[items] + (1 - share) * plug.population[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def test_strength_leads_from_the_common_persona_through_the_own_one_and_beyond() -> None:
    plug, history = _plug(persona_tokens=2), _history()
    torch.nn.init.normal_(plug.population)
    with torch.no_grad():
        common, own = plug.population * plug.spec.embedding_scale, plug(QUERIES, history).vectors
        for persona_scale in (0.25, 0.5, 1.0, 2.0):
            found = plug(QUERIES, history, persona_scale=persona_scale).vectors
            torch.testing.assert_close(found[:, :1], own[:, :1])  # the task's token is nobody's
            torch.testing.assert_close(found[:, 1:], common + persona_scale * (own[:, 1:] - common))
        assert plug(QUERIES, history, persona_scale=0).vectors.shape == (3, 0, OUT)


def test_answers_as_labels_need_a_closed_set() -> None:
    with pytest.raises(ConfigError, match="answer_channel=text"):
        _plug(answer_channel="label")
    with pytest.raises(ConfigError, match="closed set of labels"):
        _plug(label_prior="own")


@pytest.mark.parametrize("kind", ["trained", "head"])
def test_the_query_side_learns_and_the_frozen_encoder_does_not(kind: str) -> None:
    encoder = HashEncoder(WIDTH)
    plug = _plug(encoder, query_encoder=kind)
    before = encoder.encode(QUERIES)
    start = plug.weights(QUERIES, _history()).detach()
    optimizer = torch.optim.SGD(plug.parameters(), lr=1.0)
    plug(QUERIES, _history()).vectors.pow(2).sum().backward()
    optimizer.step()
    np.testing.assert_array_equal(encoder.encode(QUERIES), before)
    assert not torch.allclose(plug.weights(QUERIES, _history()), start)


def test_the_control_has_as_many_tokens_and_no_history() -> None:
    config = INSTRUCTION.plug_config(replace(PAPER, instruction_tokens=2, persona_tokens=3))
    assert (config.instruction_tokens, config.persona_tokens) == (5, 0)
    plug = _plug(instruction_tokens=5, persona_tokens=0)
    assert plug(QUERIES, None).vectors.shape == (3, 5, OUT)
    assert [name for name, _ in plug.named_parameters()] == ["instruction"]


def test_a_plug_needs_tokens_and_histories() -> None:
    with pytest.raises(ConfigError, match="both are 0"):
        _plug(instruction_tokens=0, persona_tokens=0)
    with pytest.raises(ConfigError, match="one for every query"):
        _plug()(QUERIES, None)


def test_saved_and_loaded_it_is_the_same_plug(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    plug = _plug(encoder, labels=("a", "b", "c"), answer_channel="label", persona_tokens=2)
    plug.save_pretrained(tmp_path, facts={"task": "Tiny", "steps": 3})
    again = PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM)
    assert torch.equal(plug(QUERIES, _history()).vectors, again(QUERIES, _history()).vectors)
    assert again.config == plug.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "plug.json", "plug.safetensors"]
    card = (tmp_path / "README.md").read_text()
    assert "small (weights 0123456789abcdef" in card
    assert "- steps: 3" in card


def test_only_the_plug_is_saved(tmp_path: Path) -> None:
    plug = _plug(query_encoder="head")
    plug.save_pretrained(tmp_path)
    values = sum(p.numel() for p in plug.parameters())
    assert (tmp_path / "plug.safetensors").stat().st_size < 4 * values + 2000


def test_another_language_model_or_encoder_is_refused(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    _plug(encoder).save_pretrained(tmp_path)
    other = LLMIdentity("small", None, "f" * 16, OUT)
    with pytest.raises(LLMMismatch, match=r"0123456789abcdef.*ffffffffffffffff"):
        PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=other)
    with pytest.raises(EncoderMismatch, match="hash:16"):
        PersonaPlug.from_pretrained(tmp_path, encoder=HashEncoder(WIDTH, seed=5), llm=LLM)
    moved = LLMIdentity("elsewhere/small", "abc", LLM.fingerprint, OUT)
    PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=moved)  # the same weights under another name


def test_a_plug_saved_before_there_was_a_choice_stands_in_front_of_the_text(tmp_path: Path) -> None:
    encoder = HashEncoder(WIDTH)
    _plug(encoder, placement="suffix").save_pretrained(tmp_path)
    assert PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM).config.placement == "suffix"
    told = json.loads((tmp_path / "plug.json").read_text())
    del told["config"]["placement"]
    (tmp_path / "plug.json").write_text(json.dumps(told))
    assert PersonaPlug.from_pretrained(tmp_path, encoder=encoder, llm=LLM).config.placement == "prefix"


@pytest.mark.parametrize("damage", ["no folder", "no weights", "cut weights", "no json", "newer", "not json", "no llm"])
def test_a_broken_artefact_is_named(tmp_path: Path, damage: str) -> None:
    encoder, folder = HashEncoder(WIDTH), tmp_path / "plug"
    if damage != "no folder":
        _plug(encoder).save_pretrained(folder)
    weights, about = folder / "plug.safetensors", folder / "plug.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no json":
        about.unlink()
    elif damage == "newer":
        about.write_text(json.dumps({**json.loads(about.read_text()), "format_version": 99}))
    elif damage == "no llm":
        told = json.loads(about.read_text())
        del told["fitting"]["llm"]
        about.write_text(json.dumps(told))
    elif damage == "not json":
        about.write_text("{")
    with pytest.raises(MissingData, match="plug"):
        PersonaPlug.from_pretrained(folder, encoder=encoder, llm=LLM)


def test_outer_blanks_of_an_answer_do_not_matter() -> None:
    from personaplug.data.records import HistoryItem

    encoder = HashEncoder(WIDTH)
    plug = _plug(encoder, labels=("1", "2", "3"), answer_channel="label")

    def soft(answer: str) -> torch.Tensor:
        items = [HistoryItem("1", (("text", "a film"), ("score", answer)), "score")]
        return Personalizer(plug).persona("x", items, encoder=encoder).vectors

    assert torch.equal(soft("3"), soft(" 3 "))
    assert not torch.equal(soft("3"), soft("2"))


def test_a_hint_leans_towards_what_is_like_the_question_and_the_items() -> None:
    torch.manual_seed(0)
    hint = OptionHint(2, width=OUT)
    with torch.no_grad():
        hint.log_sharpness.copy_(torch.tensor([0.1, 0.2, 0.3]))
    vectors = torch.nn.functional.normalize(torch.randn(6, WIDTH), dim=-1)
    question, options, items = vectors[0], vectors[1:3], vectors[3:]
    cosines = (options @ items.T).numpy()
    likeness = np.stack([(options @ question).numpy(), cosines.mean(axis=1), cosines.max(axis=1)], axis=1)
    leaning = np.tanh((likeness - likeness[::-1]) @ np.exp([0.1, 0.2, 0.3]))
    expected = leaning @ hint.places.detach().numpy()
    np.testing.assert_allclose(hint(question, options, items).detach(), expected, atol=1e-5)
    assert not hint(question, options[:1].expand(2, -1), items).any()  # alike: no signal
    assert torch.isfinite(hint(question, options, items[:0])).all()


def test_options_are_one_more_token_that_the_control_gets_too() -> None:
    plug, history = _plug(options="compare", labels=("[1]", "[2]"), query_encoder="head"), _history()
    options = [Options("which film?", ("a long walk", "who likes films")), None, Options("what?", ("tea", "rain"))]
    plug.remember(QUERIES, options)
    found = plug(QUERIES, history, options=options).vectors
    assert found.shape == (3, 3, OUT)
    assert plug.config.soft_tokens == INSTRUCTION.plug_config(plug.config).soft_tokens == 3
    assert not found[1, 2].any()
    vectors, answers, forms = (part[:4] for part in (history.vectors, history.answers, history.forms))
    alone = HistoryBatch(vectors, (4,), answers, forms)
    torch.testing.assert_close(plug(QUERIES[:1], alone, options=options[:1]).vectors, found[:1])
    stranger = replace(history, vectors=-history.vectors)
    assert not torch.allclose(plug(QUERIES, stranger, options=options).vectors[0, 2], found[0, 2])
    found[:, 2].sum().backward()
    assert plug.hint is not None
    assert plug.hint.log_sharpness.grad is not None
    assert plug.hint.places.grad is not None


def test_what_is_left_to_the_task_is_settled_before_a_plug_is_built() -> None:
    with pytest.raises(ConfigError, match="settled by a task"):
        _plug(answer_channel="auto")
    with pytest.raises(ConfigError, match="settled by a task"):
        _plug(options="auto")


def test_options_need_labels_to_stand_for_them() -> None:
    with pytest.raises(ConfigError, match="two or more options"):
        _plug(options="compare")


def test_strength_leaves_to_options_what_the_question_says_of_them() -> None:
    plug, history = _plug(options="compare", labels=("[1]", "[2]"), query_encoder="head"), _history()
    options = [Options("Which is it?", ("red wine", "blue cheese"))] * 3
    with torch.no_grad():
        own = plug(QUERIES, history, options=options).vectors[:, -1]
        nobodys = plug(QUERIES, _history(lengths=(0, 0, 0)), options=options).vectors[:, -1]
        for persona_scale in (0.5, 2.0):
            found = plug(QUERIES, history, options=options, persona_scale=persona_scale).vectors[:, -1]
            torch.testing.assert_close(found, nobodys + persona_scale * (own - nobodys))
    assert not torch.allclose(own[0], nobodys[0])
    torch.testing.assert_close(own[2], nobodys[2])  # has no items


def test_an_item_without_an_answer_adds_nothing_to_what_it_says() -> None:
    plug = _plug(answer_channel="label", labels=("a", "b", "c"))
    vectors = _history().vectors
    none = torch.full((len(vectors),), -1)
    hidden = plug.projector.hidden(vectors, answers=none, forms=vectors.new_empty(len(vectors), 0))
    inner = plug.projector.inner
    expected = torch.nn.functional.linear(vectors, inner.weight * plug.projector.stretch, inner.bias)
    torch.testing.assert_close(hidden, torch.nn.functional.gelu(expected))


def test_what_is_remembered_of_questions_is_bounded_and_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personaplug.plug.layers._KNOWN", 4)
    encoder = HashEncoder(WIDTH)
    frozen, asked = FrozenQueries(encoder), list[str]()
    made = encoder.query_encoder()
    plain = made.encode

    def encode(texts: list[str]) -> np.ndarray[Any, Any]:
        asked.extend(texts)
        return plain(texts)

    monkeypatch.setattr(made, "encode", encode)
    monkeypatch.setattr(frozen, "_encoder", made)
    for texts in (["a", "b", "c"], ["c", "d", "e"], ["c", "d", "e"], ["f", "g", "h", "i", "j", "k"], ["f", "k"]):
        np.testing.assert_allclose(frozen(texts).numpy(), encoder.encode(texts), atol=1e-6)
    assert asked == list("abcdefghijk"), "each is made once as long as it is asked for"
    frozen(["a"])
    assert asked[-1] == "a", "the bound holds again"
