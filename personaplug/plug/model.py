"""PersonaPlug: the trained module that turns histories and queries into soft prompts (PPlug, eq. 2 to 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from personaplug.config import PlugConfig
from personaplug.data.records import ITEM_KINDS, ItemKind, Options
from personaplug.encoders import Encoder
from personaplug.encoders.encoded_sample import Int8Array
from personaplug.errors import ConfigError, EncoderMismatch, LLMMismatch
from personaplug.infra.atomic_io import storage_errors, write_text
from personaplug.infra.model_hub import LLMIdentity
from personaplug.infra.tensor_files import load_tensors, save_tensors, shapes_of
from personaplug.llm.soft_prompt import SoftPrompt
from personaplug.plug import saving
from personaplug.plug.history_batch import HistoryBatch
from personaplug.plug.label_prior import LabelPrior
from personaplug.plug.layers import ColdStart, FrozenQueryEncoder
from personaplug.plug.persona_head import PersonaHead
from personaplug.plug.saving import PlugSpec

_NUMBERS = (
    *("part_scores", "population_score", "log_sharpness", "log_doubt", "trust"),
    *("log_near_doubt", "near_trust", "log_temperature"),
)
_KINDS = dict.fromkeys(("instruction", "population", "option_vectors"), "tokens") | dict.fromkeys(_NUMBERS, "numbers")
_COLD_TOKENS = "cold_start.tokens"
_COLD_NUMBERS = "cold_start.prior_numbers"
_MAX_COLD_ITEMS = "cold_start.max_items"  # in the file of the weights, so that prompts depend on one file


class PersonaPlug(nn.Module, ModelHubMixin):
    """Make [I; P] of eq. 5: I instruction tokens, the same for all users, and the tokens of the persona head."""

    def __init__(self, config: PlugConfig, *, spec: PlugSpec, encoder: Encoder) -> None:
        super().__init__()
        _check_config(config, labels=len(spec.labels), options=spec.option_count)
        if not encoder.identity.same_as(spec.encoder):
            raise EncoderMismatch("This plug", expected=spec.encoder.describe(), found=encoder.identity.describe())
        self._hub_mixin_config = None  # plug.json has the config, so the mixin need not write config.json
        self.config, self.spec = config, spec
        self.training_facts: Mapping[str, Any] = {}  # for the model card
        width, labels = spec.llm.width, len(spec.labels)
        self.instruction = nn.Parameter(torch.randn(config.instruction_tokens, width))
        near_width = encoder.width if config.label_prior == "neighbors" else 0
        self.label_prior = None if config.label_prior == "none" else LabelPrior(labels, width=near_width)
        self.persona = (
            PersonaHead(config, encoder=encoder, width=width, labels=labels, options=spec.option_count)
            if config.persona_tokens
            else None
        )
        self._frozen_encoder = FrozenQueryEncoder(encoder) if self.persona is None else self.persona.frozen_encoder
        self.cold_start = ColdStart()

    @property
    def ignores_query(self) -> bool:
        head = self.persona
        return not self._compares_items and (head is None or (head.query_encoder is None and head.hint is None))

    @property
    def _compares_items(self) -> bool:
        return self.label_prior is not None and self.label_prior.metric is not None

    @property
    def known_kinds(self) -> tuple[ItemKind, ...]:
        """The item kinds that the plug can read: answers, and the kinds that occurred in its training.

        The plug would treat an item of another kind as an answer.
        """
        kinds = None if self.persona is None else self.persona.projector.kind
        is_trained = [False] * (len(ITEM_KINDS) - 1) if kinds is None else kinds.any(dim=1).tolist()
        return tuple(kind for kind, is_known in zip(ITEM_KINDS, [True, *is_trained], strict=True) if is_known)

    def known_items(self, kind_ids: Int8Array) -> npt.NDArray[np.intp]:
        """Return the indices of the items of known kinds."""
        return np.flatnonzero(np.isin(kind_ids, [ITEM_KINDS.index(kind) for kind in self.known_kinds]))

    def forward(
        self,
        queries: Sequence[str],
        history: HistoryBatch | None,
        *,
        options: Sequence[Options | None] = (),
        persona_scale: float = 1.0,
    ) -> SoftPrompt:
        """Return soft prompts, (B, I + K, D), scaled like the model's embeddings. Compared options add one token.

        Args:
            history: the users' items; None only if the plug reads no history.
            options: the options in each prompt; used only if the plug compares options.
            persona_scale: interpolates between population persona (near 0) and user's persona (1), or extrapolates. 0
                gives no soft tokens. Users without items get the same tokens at every scale above 0.
        """
        if persona_scale == 0:
            return self._soft_prompt(self.instruction.new_empty(len(queries), 0, self.spec.llm.width))
        tokens = self.instruction.expand(len(queries), -1, -1)
        if history is None:
            if self.config.reads_history:
                raise ConfigError(
                    "This plug needs a history for every query; found None. A user without items has an empty history."
                )
            return self._soft_prompt(tokens)
        is_cold, bias = self.cold_start.is_cold(history), None
        visible = self.cold_start.hide_items(history, is_cold)
        if self.persona is not None and not self.cold_start.replaces_all(is_cold):
            persona = self.persona(queries, visible, options=options, persona_scale=persona_scale)
            tokens = torch.cat([tokens, persona], dim=1)
        if self.label_prior is not None:
            bias = persona_scale * self.cold_start.label_bias(
                is_cold, bias_with=partial(self.label_bias, queries, visible)
            )
        return self._soft_prompt(self.cold_start.replace_tokens(tokens, is_cold), label_bias=bias)

    def label_bias(self, queries: Sequence[str], history: HistoryBatch, prior_numbers: Tensor | None = None) -> Tensor:
        """Return the label prior of each user, (B, C), without the cold start and the persona scale.

        Args:
            prior_numbers: other numbers of the prior, see `LabelPrior.numbers`; None = its own.
        """
        assert self.label_prior is not None
        vectors = self.query_vectors(queries) if self._compares_items else None
        bias: Tensor = self.label_prior(history, vectors, numbers=prior_numbers)
        return bias

    def item_weights(self, query: str, history: HistoryBatch) -> Tensor:
        """Return the weights of one user's items, (M,): in the persona or, without one, in the label prior.

        All weights are 0 if the items have no effect.
        """
        is_cold = self.cold_start.covers(history.kind_ids)
        if self.persona is not None and not is_cold:
            return self.persona.item_weights([query], history)
        if self.label_prior is None or self.cold_start.ignores(history.kind_ids):
            return self.instruction.new_zeros(len(history.kind_ids))
        numbers = self.cold_start.prior_numbers if is_cold else None
        vectors = self.query_vectors([query]) if self._compares_items else None
        return self.label_prior.item_weights(history, vectors, numbers=numbers)

    def query_vectors(self, queries: Sequence[str]) -> Tensor:
        """Return the frozen encoder's unit vectors of queries, (B, E)."""
        return self._frozen_encoder(queries).to(self.instruction.device)

    @torch.no_grad()
    def population_prompt(self) -> SoftPrompt:
        """Return the soft prompt with the population persona, (1, S, D)."""
        persona = [] if self.persona is None else [self.persona.population_tokens()]
        return self._soft_prompt(torch.cat([self.instruction, *persona])[None])

    def _soft_prompt(self, tokens: Tensor, *, label_bias: Tensor | None = None) -> SoftPrompt:
        return SoftPrompt(tokens * self.spec.embedding_scale, self.config.placement, label_bias=label_bias)

    @torch.no_grad()
    def init_instruction(self, embeddings: Tensor) -> None:
        """Initialize the instruction tokens with token embeddings of the language model, (I, D)."""
        self.instruction.copy_(embeddings.to(self.instruction) / self.spec.embedding_scale)

    def compute_items_in(self, dtype: str) -> Self:
        """Project items in bfloat16, which is faster, if the language model uses bfloat16; else in float32."""
        if self.persona is not None:
            self.persona.item_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        return self

    def share_persona(self, other: PersonaPlug) -> None:
        """Use another plug's persona parameters, but keep this plug's instruction tokens and option hint."""
        if self.persona is not None and other.persona is not None:
            self.persona.share(other.persona)

    def cache_queries(self, queries: Sequence[str], options: Sequence[Options | None] = ()) -> None:
        """Encode and cache queries and options in advance, if a frozen encoder encodes them."""
        if self._compares_items:
            self._frozen_encoder.cache(queries)
        if self.persona is not None:
            self.persona.cache_queries(queries, options)

    def parameter_kinds(self) -> dict[str, list[nn.Parameter]]:
        """Group the trained parameters by kind: tokens, single numbers, the trained copy of the encoder, and layers."""
        kinds: dict[str, list[nn.Parameter]] = {"tokens": [], "numbers": [], "encoder": [], "layers": []}
        has_copy = self.config.query_encoder == "trained"
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            is_of_copy = has_copy and name.startswith("persona.query_encoder.")
            kinds["encoder" if is_of_copy else _KINDS.get(name.rpartition(".")[2], "layers")].append(parameter)
        return kinds

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write plug, config and model card, or raise StorageError; see `ModelHubMixin.save_pretrained`."""
        with storage_errors(Path(save_directory) / saving.ABOUT):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / saving.ABOUT).unlink(missing_ok=True)  # an old config must not describe new weights
        tensors = dict(self.state_dict())
        if self.cold_start.max_items:
            tensors[_MAX_COLD_ITEMS] = torch.tensor(self.cold_start.max_items)
        save_tensors(save_directory / saving.WEIGHTS, tensors)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        card = saving.model_card(self.config, spec=self.spec, training=self.training_facts, parameters=parameters)
        write_text(save_directory / saving.CARD, str(card))
        # Write it last, because its presence marks the plug as complete.
        saving.write_description(save_directory, self.config, spec=self.spec, training=self.training_facts)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a plug cannot be loaded without its two models
        cls, pretrained_model_name_or_path: str | Path, *, encoder: Encoder, llm: LLMIdentity | None, **hub_options: Any
    ) -> Self:
        """Load a plug in eval mode from a folder or from a repository of the Hugging Face hub.

        Args:
            llm: the language model's identity; None = the model runs elsewhere, and the caller checks its identity.
            hub_options: as for `huggingface_hub.snapshot_download` (revision, token, cache_dir, local_files_only, …).
        Raises:
            MissingData: if there is no plug, or its format is not supported; DamagedFile if its files are damaged.
            EncoderMismatch, LLMMismatch: if the plug was trained for another model.
        """
        folder = saving.find_plug(pretrained_model_name_or_path, **hub_options)
        config, spec, training = saving.read_description(folder)
        if llm is not None and (spec.llm.fingerprint, spec.llm.width) != (llm.fingerprint, llm.width):
            raise LLMMismatch(trained_for=spec.llm.describe(), given=llm.describe())
        if llm is not None and spec.llm.chat_date != llm.chat_date:
            raise ConfigError(
                f"This plug was trained with the date {spec.llm.chat_date} in its prompts; the language model prints "
                f"{llm.chat_date}. Open the language model with chat_date={spec.llm.chat_date}."
            )
        saving.check_sizes(folder, config, spec)
        plug = cls(config, spec=spec, encoder=encoder)
        plug.training_facts = training
        plug._load_weights(folder / saving.WEIGHTS)
        return plug.eval()

    def _load_weights(self, path: Path) -> None:
        cold_start: dict[str, tuple[int, ...]] = {
            _COLD_TOKENS: (self.config.soft_tokens, self.spec.llm.width),
            _MAX_COLD_ITEMS: (),
        }
        if self.label_prior is not None:
            cold_start[_COLD_NUMBERS] = tuple(self.label_prior.numbers().shape)
        tensors = load_tensors(path, remedy=saving.REMEDY, shapes=shapes_of(self), optional=cold_start)
        max_items = int(tensors.pop(_MAX_COLD_ITEMS, torch.tensor(0)))
        self.cold_start = ColdStart(
            tensors.get(_COLD_TOKENS), max_items=max_items, prior_numbers=tensors.get(_COLD_NUMBERS)
        )
        self.load_state_dict(tensors)


def _check_config(config: PlugConfig, *, labels: int, options: int) -> None:
    if config.instruction_tokens + config.persona_tokens == 0:
        raise ConfigError("A plug needs instruction_tokens or persona_tokens above 0; both are 0.")
    if "auto" in (config.answer_channel, config.options, config.label_prior):
        raise ConfigError(
            "answer_channel, options and label_prior of a plug must not be auto. Resolve them with "
            "`config_resolution.resolved`."
        )
    if config.reads_labels and config.answer_channel != "all" and not labels:
        raise ConfigError(
            "answer_channel=label and label_prior need a task with a closed set of labels; this one has none. Use "
            "answer_channel=text and label_prior=none."
        )
    if 0 < config.persona_tokens < config.state_tokens:
        raise ConfigError(
            f"state_tokens must be at most persona_tokens={config.persona_tokens}; found {config.state_tokens}."
        )
    if config.options == "compare" and config.persona_tokens and options < 2:
        raise ConfigError(
            "options=compare needs a task whose labels stand for two or more options in the prompt. Use options=ignore."
        )
