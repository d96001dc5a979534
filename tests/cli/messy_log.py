"""A log like the export of a shop's spreadsheet, with most defects that a CSV file can have."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

HEADER = ["Nr", "Kunde", "Datum", "Produkt", "Sterne", "Land"]
_ADJECTIVES = ("süße", "salzige", "scharfe", "milde", "knusprige", "weiche", "frische", "geröstete")
_NOUNS = ("Nüsse", "Kekse", "Äpfel", "Chips", "Brote", "Pralinen", "Oliven", "Käsewürfel", "Nudeln", "Suppen")
_FORMS = ("%Y-%m-%d %H:%M", "%d.%m.%Y", "%d/%m/%Y %H:%M")


@dataclass(frozen=True)
class Counts:
    """Counts of the written rows, of the rows with each defect, and of the users with a usable row."""

    rows: int
    without_user: int
    without_answer: int
    bad_dates: int
    copies: int
    users: int


def write_messy_log(path: Path, *, users: int = 130, seed: int = 0) -> Counts:
    """Write a CSV file in Windows-1252 with semicolons, decimal commas, dates in three forms and quoted newlines.

    A user likes some adjectives and dislikes others. Some rows of a user are duplicates, and some lack an answer or a
    valid date. Other rows have no user.
    """
    rng, rows = np.random.default_rng(seed), list[list[str]]()
    without_answer = bad_dates = copies = 0
    for user in range(users):
        tastes, day = rng.choice([1, 2, 4, 5], size=len(_ADJECTIVES)), datetime(2024, 1, 1)
        for number in range(int(rng.integers(4, 12))):
            day += timedelta(days=int(rng.integers(1, 25)), minutes=int(rng.integers(600)))
            adjective = int(rng.integers(len(_ADJECTIVES)))
            product = f"{_ADJECTIVES[adjective]} {rng.choice(_NOUNS)}, {number}. Wahl"
            product = f'{product}\n"Sorte {number}"; neu' if number == 1 else product
            stars = f"{tastes[adjective]},0" if rng.random() < 0.5 else str(tastes[adjective])
            row = [f" K{user:03} ", day.strftime(_FORMS[int(rng.integers(3))]), product, stars, "DE"]
            rows.append(row)
            if number == 2 and user % 3 == 0:
                rows.append(row)
                copies += 1
        if user % 5 == 0:
            rows.append([f"K{user:03}", "01.02.2025", "leere Dose ohne Wertung", rng.choice(["", "N/A"]), "AT"])
            without_answer += 1
        if user % 20 == 0:
            rows.append([f"K{user:03}", "gestern", "bunte Dose ohne Datum", "3", "AT"])
            bad_dates += 1
    without_user = 25
    rows += [["", "03.02.2025", "herrenlose Dose", "3", "CH"]] * without_user
    order = rng.permutation(len(rows))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=";", lineterminator="\r\n")
    writer.writerow([*HEADER, ""])  # a semicolon at the end of each line adds a column without a name
    writer.writerows([[str(number), *rows[index], ""] for number, index in enumerate(order, 1)])
    path.write_bytes(text.getvalue().encode("cp1252"))
    return Counts(len(rows), without_user, without_answer, bad_dates, copies, users)
