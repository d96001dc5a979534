"""CopiedAnswers: the past answers of one live user, read for a copy head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from personaplug.llm.copy_head import CopyHead, Copying, CopySource


@dataclass(frozen=True, repr=False)
class AnswerReader:
    """A copy head, and a function that reads past answers with the language model.

    The function returns the source of each answer. It waits for the model, so call it outside the event loop. It raises
    EngineFailure if the engine is closed.
    """

    head: CopyHead
    read: Callable[[Sequence[str]], list[CopySource]]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class CopiedAnswers:
    """The sources of one user's answers, oldest first, and a hash of the text of each."""

    head: CopyHead
    hashes: Sequence[bytes]
    sources: Sequence[CopySource]

    @classmethod
    def read(cls, reader: AnswerReader, texts: Sequence[str], *, earlier: CopiedAnswers | None) -> CopiedAnswers:
        """Read a user's answers, except those that an earlier version of the same user's history has."""
        sources = {} if earlier is None else dict(zip(earlier.hashes, earlier.sources, strict=True))
        hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        unread = {name: text for name, text in zip(hashes, texts, strict=True) if name not in sources}
        sources |= zip(unread, reader.read(list(unread.values())), strict=True)
        return cls(reader.head, hashes, [sources[name] for name in hashes])

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.hashes)) + sum(source.nbytes for source in self.sources)

    def copying(self) -> Copying:
        """Return the copy head for one row of a batch."""
        return Copying(self.head, [CopySource.cat(self.sources)])
