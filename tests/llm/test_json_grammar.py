"""Answers with a grammar are valid JSON for their schema, whatever the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jsonschema_rs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers_at_hand import TOKENIZERS

from personaplug.llm.base import GenerationConfig
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.continuous_batching import ContinuousBatch, Slot, SlotCopying
from personaplug.llm.copied_answers import copy_source
from personaplug.llm.json_grammar import InvalidSchema, JsonGrammar, JsonGrammars
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.token_shift import TokenShift

TOKENS = 400

_NAMES = st.sampled_from(["a", "b", "drink", "número", 'a "b"'])
_CONSTANTS = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=6), st.just([1, {"x": "y"}]))
_RANGES = st.tuples(st.integers(-300, 300), st.integers(0, 400)).map(lambda pair: (pair[0], sum(pair)))
_LEAVES = st.one_of(
    _CONSTANTS.map(lambda value: {"const": value}),
    st.lists(_CONSTANTS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    _RANGES.map(lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[1]}),
    st.integers(0, 8).map(lambda size: {"type": "string", "minLength": size // 2, "maxLength": size}),
    st.sampled_from(["^[a-z]{1,4}$", "^(ja|nein)+[0-9]?$"]).map(
        lambda p: {"type": "string", "pattern": p, "maxLength": 9}
    ),
    _RANGES.map(lambda pair: {"type": "number", "multipleOf": 0.25, "minimum": pair[0], "maximum": pair[1]}),
    st.sampled_from(["uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
)


def _nested(schemas: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(_NAMES, schemas, max_size=3)
    objects = st.tuples(properties, st.booleans()).map(
        lambda pair: {
            "type": "object",
            "properties": pair[0],
            "required": list(pair[0]) if pair[1] else [],
            "additionalProperties": False,
        }
    )
    arrays = st.tuples(schemas, st.integers(0, 2)).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 1}
    )
    return st.one_of(objects, arrays, st.lists(schemas, min_size=1, max_size=3).map(lambda some: {"anyOf": some}))


SCHEMAS = st.recursive(_LEAVES, _nested, max_leaves=5)


@pytest.fixture(scope="module")
def grammars(toy: CausalLM) -> JsonGrammars:
    return _grammars(toy)


def _grammars(llm: CausalLM) -> JsonGrammars:
    tokenizer = llm.prompt_tokenizer.tokenizer
    return JsonGrammars(tokenizer, vocabulary=llm.embed.num_embeddings, end_ids=llm.end_ids)


def _slot(llm: CausalLM, grammar: JsonGrammar | None, *, seed: int | None = None, **options: Any) -> Slot:
    config = GenerationConfig(max_new_tokens=options.pop("tokens", TOKENS))
    if seed is not None:
        config = GenerationConfig(config.max_new_tokens, do_sample=True, temperature=5.0, seed=seed)
    return Slot(llm.prompt_tokenizer.encode_prompt("hello"), None, config, grammar=grammar, **options)


def _run(llm: CausalLM, slots: Sequence[Slot]) -> list[str]:
    batch = ContinuousBatch(llm)
    batch.add(slots)
    while len(batch):
        batch.step()
    return [llm.prompt_tokenizer.decode_raw(slot.ids) for slot in slots]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS)
def test_finished_answer_is_valid_for_its_schema(toy: CausalLM, grammars: JsonGrammars, schema: dict[str, Any]) -> None:
    grammar = grammars.grammar(schema)
    slots = [_slot(toy, grammar.copy(), seed=seed) for seed in (None, 0, 1)]
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for slot, text in zip(slots, _run(toy, slots), strict=True):
        if slot.ended == "stop":
            validator.validate(json.loads(text))
        else:
            assert (slot.ended, len(slot.ids)) == ("length", TOKENS)


def test_any_object_is_valid_json(toy: CausalLM, grammars: JsonGrammars) -> None:
    slots = [_slot(toy, grammars.grammar({"type": "object"}), seed=seed, tokens=1500) for seed in range(12)]
    texts = _run(toy, slots)
    finished = [text for slot, text in zip(slots, texts, strict=True) if slot.ended == "stop"]
    assert finished
    for text in finished:
        assert isinstance(json.loads(text), dict)
        text.encode()  # no lone surrogates


def test_answer_ends_as_soon_as_nothing_can_follow(toy: CausalLM, grammars: JsonGrammars) -> None:
    slot = _slot(toy, grammars.grammar({"const": {"a": [1, 2]}}))
    assert _run(toy, [slot]) == ['{"a": [1, 2]}']
    assert slot.ended == "stop"


def test_early_end_of_an_answer_is_reported(toy: CausalLM, grammars: JsonGrammars) -> None:
    slot = _slot(toy, grammars.grammar({"const": "tea and coffee"}), tokens=5)
    assert _run(toy, [slot]) == ['"tea ']
    assert slot.ended == "length"


def test_grammar_of_a_row_does_not_change_other_rows(toy: CausalLM, grammars: JsonGrammars) -> None:
    (alone,) = _run(toy, [_slot(toy, None, tokens=40)])
    first, second = grammars.grammar({"enum": ["tea", "coffee"]}), grammars.grammar({"type": "integer"})
    rows = [
        _slot(toy, first),
        _slot(toy, None, tokens=40),
        _slot(toy, second, seed=1, tokens=10, shift=TokenShift(bias={5: 100.0})),
        _slot(toy, first.copy(), seed=2),
    ]
    texts = _run(toy, rows)
    assert texts[1] == alone
    assert json.loads(texts[0]) in ("tea", "coffee")
    assert json.loads(texts[3]) in ("tea", "coffee")


def test_bias_cannot_break_the_grammar(toy: CausalLM, grammars: JsonGrammars) -> None:
    bias = dict.fromkeys(range(257), -100.0) | {toy.end_ids[0]: 100.0}
    slot = _slot(toy, grammars.grammar({"const": {"a": 1}}), shift=TokenShift(presence=2.0, bias=bias))
    assert _run(toy, [slot]) == ['{"a": 1}']


def test_answer_with_a_copy_head_follows_the_grammar(toy: CausalLM, grammars: JsonGrammars) -> None:
    head = toy.new_copy_head(seed=0)
    with torch.no_grad():
        head.gate.bias.copy_(torch.tensor([-60.0, 0.0, 60.0]))  # copies, so the model alone has almost no share
    soft = SoftPrompt(torch.randn(1, 2, toy.identity.width) * toy.embedding_scale, placement="suffix")
    slot = _slot(
        toy, grammars.grammar({"const": {"a": [True]}}), copying=SlotCopying(head, copy_source(toy, head, ["x"]))
    )
    slot.soft = soft
    assert _run(toy, [slot]) == ['{"a": [true]}']


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"type": "string", "pattern": "(a"}, "unclosed"),
        ({"type": "string", "format": "emoji"}, "emoji"),
        ({"not": {"type": "string"}}, "not"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}], "x-guidance": {"coerce_one_of": True}}, "oneOf"),
        ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/$defs/x"}, "x"),
        ({"$ref": "https://example.org/schema.json"}, "example"),
        ({"$ref": "file:///etc/passwd"}, "passwd"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no answer can match"),
        ({"multipleOf": 1009}, "multipleOf"),
        ({"allOf": [{"multipleOf": 7919}, {"multipleOf": 104729}, {"multipleOf": 1299709}]}, "multipleOf"),
        ({"type": "number", "multipleOf": 1e-300}, "multipleOf"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ],
)
def test_schema_that_cannot_be_followed_is_refused(grammars: JsonGrammars, schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidSchema, match=reason):
        grammars.grammar(schema)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_grammars_fit_tokenizers_of_several_kinds(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    vocabulary = len(tokenizer) + 7  # models often have more rows than tokens
    grammars = JsonGrammars(tokenizer, vocabulary=vocabulary, end_ids=[tokenizer.eos_token_id])
    grammar = grammars.grammar({"const": {"a": [1, "b </s> c"]}})
    ids: list[int] = []
    while not grammar.is_complete:
        masked = grammar.masked(torch.randn(vocabulary))
        ids.append(int(masked.argmax()))
        grammar.accept(ids[-1])
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == '{"a": [1, "b </s> c"]}'
    assert tokenizer.eos_token_id not in ids
    with pytest.raises(ValueError, match="grammar"):
        grammar.accept(ids[0])
