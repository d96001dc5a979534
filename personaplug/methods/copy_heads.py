"""CopyingPrompter: soft tokens with a copy head, for rows whose users' past answers may be copied."""

from __future__ import annotations

from collections.abc import Sequence

from personaplug.encoders.encoded_sample import EncodedSample
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.copied_answers import answer_sources
from personaplug.llm.copy_head import CopyHead, Copying, CopySource
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.personalizer import SoftPrompter


class CopyingPrompter:
    """Soft tokens of another prompter, and the past answers of each sample (`EncodedSample.own_answers`).

    Each answer is read once for all samples and users.
    """

    def __init__(self, prompter: SoftPrompter, *, head: CopyHead, llm: CausalLM) -> None:
        self.prompter, self.head, self.llm = prompter, head, llm
        self._sources: dict[str, CopySource] = {}

    @property
    def placement(self) -> str:
        return self.prompter.placement

    def soft_prompt(self, samples: Sequence[EncodedSample]) -> SoftPrompt:
        """Make the soft prompts of samples, (B, S, D)."""
        return self.prompter.soft_prompt(samples)

    def copying(self, samples: Sequence[EncodedSample]) -> Copying:
        """Return the copy head with the past answers of each sample."""
        texts = dict.fromkeys(text for sample in samples for text in sample.own_answers)
        unread = [text for text in texts if text not in self._sources]
        self._sources |= zip(unread, answer_sources(self.llm, self.head, unread), strict=True)
        own = [CopySource.cat([self._sources[text] for text in sample.own_answers]) for sample in samples]
        return Copying(self.head, own)
