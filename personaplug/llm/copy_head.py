"""Copy head: mix the frozen model's next token with tokens of the prompt and of the user's past answers.

    p(y) = g₀ · LM(y) + g₁ · Σ a_j [x_j = y] + g₂ · Σ b_j [z_j = y]

x are the tokens of the prompt, z those of the past answers. a and b are softmax weights of pointers: products of the
current state and of the state *before* each token, so a token is copied in a context like that of its first use. The
gate g, three shares with the sum 1, depends on the current state.

A state is the vector of values that one attention layer of the frozen model caches for a position. So the states of a
prompt are in the prompt cache anyway. The model stays frozen; the head has about 50,000 parameters for SmolLM2-135M.

Sources: pointer-generator networks (https://arxiv.org/abs/1704.04368), and keys from the state before a token as in
kNN-LM (https://arxiv.org/abs/1911.00172).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from personaplug.infra.tensor_files import load_tensors, save_tensors, shapes_of
from personaplug.llm.prompt_state import Layout

KEY_WIDTH = 64
_WEIGHTS = "copy_head.safetensors"
_DEPTH = 2 / 3  # of the layer that states come from; chosen on held-out users of LaMP_7's train
_KEY_STEP = 1 / 16  # of int8 keys, whose values are between −√64 and √64
_INITIAL_SCALE = 2.0
_INITIAL_COPY_LOGIT = -2.0  # a copied token has about a tenth of the model's probability at first


def copy_layer(layers: int) -> int:
    """Return which attention layer's values are the states, for a model with this many attention layers."""
    return min(layers - 1, round(_DEPTH * layers))


@dataclass(frozen=True, repr=False)
class CopySource:
    """Tokens that may be copied, (n,), and the key of the state before each token, (n, K), float or int8."""

    keys: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.tokens.nbytes

    def float_keys(self) -> Tensor:
        return self.keys if self.keys.is_floating_point() else self.keys.float() * _KEY_STEP

    def expanded(self, device: torch.device) -> CopySource:
        """Return the source with float keys on a device, for repeated use."""
        return CopySource(self.float_keys().to(device), self.tokens.to(device))

    def compressed(self) -> CopySource:
        """Return the source with int8 keys and int32 tokens, on the CPU."""
        keys = (self.keys.detach() / _KEY_STEP).round().clamp(-127, 127).to("cpu", torch.int8)
        return CopySource(keys, self.tokens.to("cpu", torch.int32))

    @classmethod
    def cat(cls, sources: Sequence[CopySource]) -> CopySource:
        """Concatenate compressed sources, or return an empty one."""
        if not sources:
            return cls(torch.empty(0, KEY_WIDTH, dtype=torch.int8), torch.empty(0, dtype=torch.int32))
        return cls(torch.cat([source.keys for source in sources]), torch.cat([source.tokens for source in sources]))


class Pointer(nn.Module):
    """Scores of source tokens, given the current states; states have W values, keys K."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, KEY_WIDTH, bias=False)
        self.key = nn.Linear(width, KEY_WIDTH, bias=False)
        nn.init.orthogonal_(self.query.weight)
        self.key.weight.data.copy_(self.query.weight.data)  # so equal states have the highest score
        self.log_scale = nn.Parameter(torch.tensor(math.log(_INITIAL_SCALE)))

    def source(self, states: Tensor, tokens: Tensor) -> CopySource:
        """Return the source of tokens (n,), given the states before them, (n, W)."""
        return CopySource(_standardized(self.key(_standardized(states))), tokens)

    def queries(self, states: Tensor) -> Tensor:
        """Return the queries of N states (N, W), so that products with keys are scores; (N, K)."""
        queries = _standardized(self.query(_standardized(states)))
        return queries * (self.log_scale.exp() / math.sqrt(KEY_WIDTH))

    def weights(self, states: Tensor, source: CopySource) -> Tensor:
        """Return the weights of the source's tokens for N states (N, W); (N, n), each row with the sum 1."""
        return torch.softmax(self.queries(states) @ source.float_keys().T, dim=1)


@dataclass(frozen=True, repr=False)
class CopyInputs:
    """What the head reads of one answer of L tokens, given its prompt of n tokens.

    Attributes:
        losses: (L,) −log p of each token by the language model.
        states: (L, W) state before each token.
        targets: (L,) the tokens.
        prompt_states, prompt_tokens: (n − 1, W) and (n − 1,): each token of the prompt and the state before it.
    """

    losses: Tensor
    states: Tensor
    targets: Tensor
    prompt_states: Tensor
    prompt_tokens: Tensor


class CopyHead(nn.Module):
    """Pointers into the prompt and into past answers, and the gate.

    Args:
        width: number of values of a state (W): key-value heads × head width.
        layer: index of the attention layer whose values are the states.
    """

    def __init__(self, width: int, *, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.prompt, self.own = Pointer(width), Pointer(width)
        self.gate = nn.Linear(width, 3)
        nn.init.zeros_(self.gate.weight)
        self.gate.bias.data = torch.tensor([0.0, _INITIAL_COPY_LOGIT, _INITIAL_COPY_LOGIT])

    @classmethod
    def for_layout(cls, layout: Layout, *, seed: int = 0) -> CopyHead:
        """Return an untrained head for a model whose cached states have this layout."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            part = layout.values[copy_layer(len(layout.values))]
            return cls(math.prod(layout.blocks[part.block].shape), layer=part.layer)

    def save(self, folder: Path) -> None:
        """Write the weights; raise StorageError if the disk is full."""
        save_tensors(folder / _WEIGHTS, self.state_dict())

    @classmethod
    def load(cls, folder: Path, *, layout: Layout) -> CopyHead:
        """Load a saved head for a model with this layout; DamagedFile if the file is damaged or of another model."""
        head, remedy = cls.for_layout(layout), f"Restore it, or delete {folder} and train the copy head again."
        head.load_state_dict(load_tensors(folder / _WEIGHTS, remedy=remedy, shapes=shapes_of(head)))
        return head.eval().requires_grad_(False)

    def losses(self, inputs: CopyInputs, own: CopySource) -> Tensor:
        """Return −log p of each token of an answer, (L,); `own` are the user's past answers."""
        prompt, own = self.prompt.source(inputs.prompt_states, inputs.prompt_tokens), own.expanded(inputs.states.device)
        shares = self._log_shares(inputs.states, is_empty=[[False, not len(prompt), not len(own)]])
        terms = [shares[:, 0] - inputs.losses]
        for pointer, source, share in ((self.prompt, prompt, shares[:, 1]), (self.own, own, shares[:, 2])):
            if len(source):
                is_target = source.tokens[None] == inputs.targets[:, None]
                copied = (pointer.weights(inputs.states, source) * is_target).sum(dim=1)
                terms.append(share + copied.clamp(min=torch.finfo(copied.dtype).tiny).log())
        return -torch.logsumexp(torch.stack(terms), dim=0)

    @torch.no_grad()
    def mix(
        self, logits: Tensor, states: Tensor, *, prompts: Sequence[CopySource], own: Sequence[CopySource]
    ) -> Tensor:
        """Return the log-probabilities of the next tokens of R rows, (R, V).

        Args:
            logits: (R, V) of the language model.
            states: (R, W) of the last tokens.
            prompts, own: the sources of each row.
        """
        is_empty = [[False, not len(prompt), not len(answers)] for prompt, answers in zip(prompts, own, strict=True)]
        shares = self._log_shares(states, is_empty=is_empty)
        mixed = shares[:, :1] + torch.log_softmax(logits.float(), dim=-1)
        copied = torch.zeros_like(mixed)
        for pointer, sources, share in ((self.prompt, prompts, shares[:, 1]), (self.own, own, shares[:, 2])):
            queries = pointer.queries(states)
            for row, source in enumerate(sources):
                if len(source):
                    weights = torch.softmax(source.float_keys().to(queries.device) @ queries[row], dim=0)
                    copied[row].index_add_(0, source.tokens.to(copied.device), share[row].exp() * weights)
        # Logarithms are added, so that no token of the model gets the probability 0 by rounding: a grammar may need it.
        places = copied.nonzero(as_tuple=True)
        mixed[places] = torch.logaddexp(mixed[places], copied[places].log())
        return mixed.masked_fill(logits == -torch.inf, -torch.inf)

    def _log_shares(self, states: Tensor, *, is_empty: Sequence[Sequence[bool]]) -> Tensor:
        """Return the logs of the gate's shares, (N, 3); an empty source has no share.

        `is_empty` has a row for each state, or one row for all.
        """
        logits = self.gate(_standardized(states))
        mask = torch.tensor(is_empty, device=logits.device)
        return torch.log_softmax(logits.masked_fill(mask, -torch.inf), dim=1)


@dataclass(frozen=True, repr=False)
class Copying:
    """A copy head, and the past answers of the user of each row of a batch."""

    head: CopyHead
    own: Sequence[CopySource]

    def take(self, indices: Sequence[int]) -> Copying:
        """Return these rows; a row may occur more than once."""
        return Copying(self.head, [self.own[index] for index in indices])


def _standardized(states: Tensor) -> Tensor:
    return nn.functional.layer_norm(states.float(), states.shape[-1:])
