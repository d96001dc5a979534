"""Build a tiny random model of each text generation family in transformers, and check which families are supported.

    python benchmarks/model_families.py --out docs/families.md      # all families
    python benchmarks/model_families.py llama mamba t5              # some families, printed

The script loads and checks each model, trains it for a step, scores labels and generates text. It compares losses,
scores and texts with token-by-token passes of the bare transformers model over single rows of ids.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto

from personaplug.errors import UnsupportedModel
from personaplug.llm.base import GenerationConfig, LanguageModel, PromptBatch
from personaplug.llm.loading import wrap_model
from personaplug.llm.seq2seq_lm import Seq2SeqLM
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.llm.tiny import tiny_tokenizer

CAUSAL = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEQ2SEQ = dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
PROMPTS = ["What is it?", "A question of some length, with commas: yes or no?"]
TARGETS = ["no", "yes!"]
NEW_TOKENS = 4
MAX_ERROR = 1e-4  # nats, in float32

_MAX_PARAMETERS = 40_000_000
_SECONDS = 300
_VOCABULARY = 257  # of `tiny_tokenizer`
_SIZES: dict[int, str] = {
    _VOCABULARY: "vocab_size n_vocab vocab_size_per_layer_input text_vocab_size",
    32: "hidden_size d_model n_embd dim embed_dim n_embed embedding_size emb_dim word_embed_proj_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads linear_num_heads linear_num_value_heads "
    "linear_num_key_heads num_experts num_local_experts n_routed_experts moe_num_experts conv_kernel",
    8: "head_dim d_kv attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_head "
    "mamba_head_dim mamba_headdim mamba_d_state ssm_state_size state_size chunk_size mamba_chunk_size rotary_dim",
    16: "kv_lora_rank q_lora_rank hidden_size_per_layer_input",
    48: "intermediate_size d_ff ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size ffn_hidden_size "
    "shared_expert_intermediate_size dense_intermediate_size expert_ffn_hidden_size",
    512: "max_position_embeddings n_positions n_ctx",
    0: "pad_token_id eos_token_id bos_token_id",
    1: "decoder_start_token_id n_group topk_group num_expert_group",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
_ALWAYS = ("head_dim", "pad_token_id", "eos_token_id", "decoder_start_token_id")  # even if the default is None
_LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers"
)
_KEY_HEADS = "num_key_value_heads num_kv_heads n_head_kv"
_PER_TOKEN = "num_experts_per_tok num_experts_per_token moe_k top_k_experts moe_top_k"
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")
_SHARED_KEYS = {  # the last two layers read the keys of the first two
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
}
# Values that cannot be derived from names: sizes that depend on each other, or periods of layers.
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {**_SHARED_KEYS, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _SHARED_KEYS,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"n_groups": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
}


class NotBuilt(Exception):
    """No tiny model of a family runs without further inputs."""


@dataclass(frozen=True)
class Outcome:
    family: str
    kind: str  # fast, slow, refused, not built, or wrong (a bug in this package)
    reason: str = ""
    error: float = 0.0  # largest difference from the bare model, in nats


def build(family: str, *, is_encoder_decoder: bool, **changes: Any) -> Any:
    """Return a tiny random model of a family; `changes` override values of its config."""
    reasons = []
    for key_heads in (2, 4):
        try:
            model = _build(family, changes, is_encoder_decoder=is_encoder_decoder, key_heads=key_heads)
            ids = torch.arange(1, 12)[None]
            decoder = {"decoder_input_ids": ids[:, :4]} if is_encoder_decoder else {}
            with torch.no_grad():
                if not bool(torch.isfinite(model(input_ids=ids, **decoder).logits).all()):
                    raise NotBuilt("its logits are not finite")
            return model
        except _TimeUp:
            raise
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise NotBuilt(reasons[-1])


def _build(family: str, changes: dict[str, Any], *, is_encoder_decoder: bool, key_heads: int) -> Any:
    config_class = CONFIG_MAPPING[family]
    start = {"decoder_start_token_id": 1} if is_encoder_decoder else {}
    values = {**_tiny(config_class().to_dict(), key_heads), **start, **_SPECIAL.get(family, {})}
    if not is_encoder_decoder and "is_decoder" in config_class().to_dict():
        values["is_decoder"] = True  # families that are encoders by default
    config = config_class(**values | changes)
    factory: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in factory.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise NotBuilt(f"the shrunk config still has {size / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    model = factory.from_config(config).eval()
    with torch.no_grad():  # otherwise all tokens are almost equally likely, which hides errors
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.1:
                parameter.mul_(4)
    return model


def _tiny(config: dict[str, Any], key_heads: int) -> dict[str, Any]:
    """Return smaller values for a default config, including nested configs."""
    kinds = {name: list(dict.fromkeys(config[name])) for name in _LAYER_LISTS if isinstance(config.get(name), list)}
    layers = max([2, *map(len, kinds.values())])
    values: dict[str, Any] = {name: [*each, *[each[-1]] * layers][:layers] for name, each in kinds.items() if each}
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            values[name] = {"model_type": value["model_type"], **_tiny(value, key_heads)}
        elif name in _LAYERS.split():
            values[name] = layers
        elif name in _KEY_HEADS.split():
            values[name] = key_heads
        elif name in _PER_TOKEN.split() and isinstance(value, int):
            values[name] = min(value, 2)
        elif name in _SIZE_OF and (isinstance(value, int) or name in _ALWAYS):
            values[name] = _SIZE_OF[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            values[name] = min(value, _VOCABULARY - 1)
    return values


def load(family: str, *, is_encoder_decoder: bool, **changes: Any) -> LanguageModel:
    """Build and check a tiny model; raise NotBuilt or UnsupportedModel."""
    model = build(family, is_encoder_decoder=is_encoder_decoder, **changes)
    return wrap_model(model, tiny_tokenizer(), name=family)


def largest_error(llm: LanguageModel) -> float:
    """Compute losses, scores, texts and gradients; return the largest difference from the bare model, in nats."""
    batch = PromptBatch(PROMPTS)
    rows = [llm.prompt_tokenizer.encode_prompt(prompt).ids for prompt in PROMPTS]
    targets = [llm.prompt_tokenizer.encode_target(target) for target in TARGETS]
    expected = torch.tensor([[_bare_loss(llm, row, target) for target in targets] for row in rows])
    losses = llm.loss(batch, TARGETS)[0]
    label_ids = llm.prompt_tokenizer.encode_labels(TARGETS)
    scores = torch.tensor([[-_bare_loss(llm, row, ids) for ids in label_ids] for row in rows])
    errors = [losses - expected.diagonal(), llm.score(batch, TARGETS) - scores]
    texts = [generation.text for generation in llm.generate(batch, GenerationConfig(max_new_tokens=NEW_TOKENS))]
    if texts != [llm.prompt_tokenizer.decode(_bare_answer(llm, row)) for row in rows]:
        return float("inf")
    for placement in ("prefix", "suffix"):
        vectors = (torch.randn(2, 2, llm.identity.width) * llm.embedding_scale).requires_grad_()
        losses = llm.loss(PromptBatch(PROMPTS, SoftPrompt(vectors, placement)), TARGETS)[0]
        gradient = torch.autograd.grad(losses.sum(), vectors)[0]
        if not bool(torch.isfinite(gradient).all()) or float(gradient.abs().sum()) == 0:
            return float("nan")
    return max(float(error.abs().max()) for error in errors)


@torch.no_grad()
def _bare_logits(llm: LanguageModel, prompt: Iterable[int], answer: list[int]) -> Tensor:
    """Return the bare model's logits, (V,), of the next token after a prompt and the start of an answer."""
    if isinstance(llm, Seq2SeqLM):
        ids = {"input_ids": [*prompt], "decoder_input_ids": [*llm.start_ids, *answer]}
    else:
        ids = {"input_ids": [*prompt, *answer]}
    logits: Tensor = llm.model(**{name: torch.tensor([row]) for name, row in ids.items()}).logits
    return logits[0, -1].double()


def _bare_loss(llm: LanguageModel, prompt: Iterable[int], target: Iterable[int]) -> float:
    answer, total = list[int](), 0.0
    for token in target:
        total -= float(torch.log_softmax(_bare_logits(llm, prompt, answer), dim=-1)[token])
        answer.append(token)
    return total


def _bare_answer(llm: LanguageModel, prompt: Iterable[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < NEW_TOKENS:
        token = int(_bare_logits(llm, prompt, answer).argmax())
        if token in llm.end_ids:
            break
        answer.append(token)
    return answer


class _TimeUp(BaseException):
    """A family takes too long. Not an Exception, so that no `except Exception` catches it."""


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TimeUp

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def examine(family: str, *, is_encoder_decoder: bool) -> Outcome:
    """Build, check and verify one family."""
    try:
        with _limited(_SECONDS):
            llm = load(family, is_encoder_decoder=is_encoder_decoder)
            error = largest_error(llm)
            if not error < MAX_ERROR:
                return Outcome(family, "wrong", f"it differs from the bare model by {error:.2g} nats", error)
    except NotBuilt as failure:
        return Outcome(family, "not built", str(failure))
    except UnsupportedModel as refusal:
        return Outcome(family, "refused", refusal.reason)
    except Exception as failure:  # an accepted model must not fail afterwards
        return Outcome(family, "wrong", f"{type(failure).__name__}: {failure}")
    except _TimeUp:
        return Outcome(family, "not built", f"it takes more than {_SECONDS} s")
    reasons = [llm.check.why_not_faster, llm.check.why_no_prompt_cache and f"no cache: {llm.check.why_no_prompt_cache}"]
    reason = "; ".join(filter(None, reasons))
    return Outcome(family, "slow" if reason else "fast", f"{llm.check.way}: {reason}" if reason else "", error)


def examine_all(families: Iterable[str] = ()) -> Iterator[Outcome]:
    """Examine families, by default all causal and encoder-decoder language models of transformers."""
    selected = set(families)
    for mapping, is_encoder_decoder in ((CAUSAL, False), (SEQ2SEQ, True)):
        for family in sorted(mapping):
            if not selected or family in selected:
                outcome = examine(family, is_encoder_decoder=is_encoder_decoder)
                name = f"{family} (encoder-decoder)" if is_encoder_decoder and family in CAUSAL else family
                yield Outcome(name, outcome.kind, outcome.reason, outcome.error)


_TITLES = {
    "wrong": "Accepted with wrong numbers: faults",
    "fast": "All features, cached prompts included",
    "slow": "Slower, or without cached prompts",
    "refused": "Refused when loaded",
    "not built": "Unknown, because no tiny model could be built",
}


def as_markdown(outcomes: list[Outcome]) -> str:
    """Return the list of families for `docs/families.md`."""
    parts = []
    for kind, title in _TITLES.items():
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if not of_kind:
            continue
        parts.append(f"### {title} ({len(of_kind)})\n")
        if kind == "fast":
            parts.append(_names(of_kind) + "\n")
            continue
        by_reason: dict[str, list[Outcome]] = {}
        for outcome in of_kind:
            by_reason.setdefault(outcome.reason.replace("|", "/").replace("<", "&lt;"), []).append(outcome)
        lines = [f"| {_names(same)} | {reason} |" for reason, same in by_reason.items()]
        parts.append("\n".join(["| families | reason |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def _names(outcomes: list[Outcome]) -> str:
    return ", ".join(f"`{outcome.family}`" for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="names in transformers' config mapping; default: all")
    parser.add_argument("--out", type=Path, help="page in which to replace the list")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable(logging.WARNING)
    outcomes = []
    for outcome in examine_all(options.families):
        print(f"{outcome.family}: {outcome.kind} {outcome.error:.1e} {outcome.reason}", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    text = as_markdown(outcomes)
    if options.out is None:
        print(text)
        return
    head = options.out.read_text(encoding="utf-8").partition("<!-- the list -->")[0]
    title = f"<!-- the list -->\n\n## The list, with transformers {version('transformers')}\n\n"
    options.out.write_text(head + title + text, encoding="utf-8")


if __name__ == "__main__":
    main()
