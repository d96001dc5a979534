"""Small tokenizers of several kinds, built without downloads."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from personaplug.llm.tiny import tiny_tokenizer

SPELLED = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "[INST]", "</s>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_SIGNS = sorted({*"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 .,:;!?'\"()-_/\\|<>[]{}\n"})


def bytes_tokenizer() -> Any:
    """Return a tokenizer with a token per byte and added tokens: special ones, `<think>`, white space, a word."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "</s>"]})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "[INST]", "    ", "kubernetes"])
    return tokenizer


def pieces_tokenizer() -> Any:
    """Return a unigram tokenizer with control tokens in its vocabulary, like T5's."""
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), *((s, 0.0) for s in SPELLED if s != "</s>")]
    signs = [sign if sign != " " else "▁" for sign in _SIGNS]
    vocabulary += [(sign, -5.0) for sign in signs]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    kind: Any = PreTrainedTokenizerFast
    special_tokens = [AddedToken(text, special=True) for text in SPELLED[:2]]
    tokenizer = kind(
        tokenizer_object=backend,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=special_tokens,
    )
    tokenizer.add_tokens(list(SPELLED[2:6]))
    return tokenizer


def space_first_tokenizer() -> Any:
    """Return a tokenizer like Llama 2's: the first token includes a leading space, and `<s>` is in the vocabulary."""
    signs = ["▁" if sign == " " else sign for sign in _SIGNS]
    words = [f"▁{sign}" for sign in signs if sign.isalpha()]
    vocabulary = {text: index for index, text in enumerate(["<unk>", "<s>", "</s>", *signs, *words])}
    merges = [("▁", word[1:]) for word in words]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    kind: Any = PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    tokenizer.add_tokens(list(SPELLED[:6]))
    return tokenizer


TOKENIZERS = {"bytes": bytes_tokenizer, "pieces": pieces_tokenizer, "space_first": space_first_tokenizer}
