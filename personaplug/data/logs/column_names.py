"""Names that people give to the columns of a log. Of two columns with a known name, the earlier name counts."""

from __future__ import annotations

import re
from collections.abc import Sequence

USER_NAMES = (
    "user_id", "userid", "user", "uid", "user_name", "username", "user_email", "customer_id", "customer", "client_id",
    "client", "account_id", "account", "member_id", "member", "subscriber_id", "reviewer_id", "reviewer", "author_id",
    "author", "person_id", "person", "student_id", "patient_id", "employee_id", "player_id", "profile_id",
    "customer_email", "email", "kunde", "kunden_id", "kundennummer", "kundennr", "benutzer", "benutzer_id", "nutzer",
    "nutzer_id", "utilisateur", "usuario", "cliente", "utente",
)  # fmt: skip

ANSWER_NAMES = (
    "answer", "rating", "stars", "star_rating", "score", "response", "reply", "completion", "output", "label",
    "category", "choice", "sentiment", "tag", "target", "grade", "vote", "verdict", "decision", "class", "bewertung",
    "sterne", "antwort", "kategorie", "note", "puntuacion", "respuesta", "reponse", "valoracion",
)  # fmt: skip

QUESTION_NAMES = (
    "question", "prompt", "query", "instruction", "input", "request", "title", "product", "product_name", "item_name",
    "item", "movie", "film", "book", "song", "recipe", "text", "question_text", "review_text", "review", "content",
    "body", "article", "comment", "description", "headline", "subject", "message", "name", "frage", "titel", "produkt",
    "artikel", "pregunta", "producto", "titulo", "titre", "produit",
)  # fmt: skip

DATE_NAMES = (
    "timestamp", "datetime", "date_time", "created_at", "created", "date", "time", "event_time", "event_date",
    "order_date", "review_date", "answered_at", "submitted_at", "day", "when", "ts", "datum", "zeitpunkt", "zeit",
    "erstellt", "fecha", "data", "date_creation",
)  # fmt: skip

ID_NAMES = (
    "event_id", "id", "row_id", "record_id", "log_id", "review_id", "message_id", "interaction_id", "answer_id",
    "response_id", "uuid", "guid", "nr", "no",
)  # fmt: skip

IMAGE_NAMES = (
    "image", "picture", "photo", "img", "pic", "photograph", "thumbnail", "screenshot", "bild", "foto", "imagen",
    "imagem", "immagine",
)  # fmt: skip

VECTOR_NAMES = ("embedding", "embeddings", "vector", "emb", "vec")

OTHER_DATE_WORDS = (
    "birth", "born", "dob", "updated", "modified", "deleted", "expires", "geburt", "signup", "registered",
)  # fmt: skip
"""Parts of the names of dates that are not those of the event."""


def key_of(name: str) -> str:
    """Return the name of a column in small letters with underscores: `userId` and `User ID` are `user_id`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^\w]+|_+", "_", words.casefold()).strip("_")


def rank_of(key: str, common: Sequence[str]) -> int | None:
    """Return the place of a name among common names. A name that contains one, `star_rating_2`, comes after all."""
    if key in common:
        return common.index(key)
    words = key.split("_")
    places = [common.index(word) for word in words if word in common]
    return len(common) + min(places) if places else None
