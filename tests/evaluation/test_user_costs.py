"""What a user costs under each row: worked out by hand."""

from __future__ import annotations

import pytest

from personaplug.data.records import HistoryItem, Sample
from personaplug.encoders import HashEncoder
from personaplug.evaluation.user_costs import Cost, CostMeter
from personaplug.methods import condition_of

ITEMS = tuple(HistoryItem(str(k), (("text", "é" * 10), ("score", "4")), "score") for k in range(3))
METER = CostMeter([3, 5], [Sample("1", "u", "p", "q", "1", ITEMS)], encoder=HashEncoder(32))
TEXT = len("text: éééééééééé score: 4".encode())


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("plain", 0),
        ("instruction-only", 0),
        ("lora", 0),
        ("plug", 4 * 32 * 2),
        ("wrong-user", 4 * 32 * 2),
        ("population-persona", 0),
        ("mean-persona", 0),
        ("bm25:4", 4 * TEXT),
        ("instruction+recency:2", 4 * TEXT),
        ("dense:4", 4 * (TEXT + 64)),
        ("ropg:4", 4 * (TEXT + 64)),
        ("plug+bm25:1", 4 * (TEXT + 64)),
        ("plug+dense:1", 4 * (TEXT + 64)),
    ],
)
def test_bytes_per_user_are_means_over_samples(name: str, kept: float) -> None:
    assert METER.of(condition_of(name)).bytes == pytest.approx(kept)


def test_encoding_takes_time_and_indexing_words_does_not() -> None:
    assert METER.of(condition_of("plug")).seconds > 0
    assert METER.of(condition_of("bm25:4")).seconds == 0
    assert METER.of(condition_of("plain")) == Cost(0.0, 0.0)


def test_what_was_measured_elsewhere_is_added() -> None:
    assert METER.of(condition_of("profile"), own=Cost(50.0, 0.5)) == Cost(50.0, 0.5)
    assert METER.of(condition_of("profile+bm25:4"), own=Cost(50.0, 0.5)) == Cost(50.0 + 4 * TEXT, 0.5)


def test_nobody_has_a_history() -> None:
    meter = CostMeter([0, 0], [Sample("1", "u", "p", "q", "1")], encoder=HashEncoder(32))
    assert meter.of(condition_of("plug")) == Cost(0.0, 0.0)
