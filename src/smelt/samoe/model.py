"""SaMoE as transformers citizens: a causal and a masked language model, a classifier."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
)
from transformers.cache_utils import Cache

from smelt.errors import RecipeError
from smelt.samoe.backbone import SaMoEModel, SaMoEOutput, SaMoEPreTrainedModel, either
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.moe import balance_loss, z_loss
from smelt.samoe.phases import mark

logger = logging.getLogger(__name__)


class _LanguageModel(SaMoEPreTrainedModel):
    """A head on the backbone; abstract but for what causal and masked models share."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SaMoEConfig) -> None:
        super().__init__(config)
        self.model = SaMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = cast(nn.Linear, new_embeddings)

    def skip_entries(self, threshold: float) -> list[tuple[int, ...]]:
        """Leave out pool entries whose |α| is below the threshold; what each MoE layer still runs.

        No retraining: at a threshold of 0 every entry runs again.

        Raises:
            RecipeError: a layer would be left without any.
        """
        layers = self.model.moe_layers()
        before = [layer.kept for layer in layers]
        try:
            for layer in layers:
                layer.skip_entries(threshold)
        except RecipeError:
            for layer, kept in zip(layers, before, strict=True):
                layer.kept = kept
            raise
        return [
            layer.kept or tuple(range(self.config.pool_size if layer.alpha is not None else 1))
            for layer in layers
        ]

    def _run(
        self, labels: Tensor | None, logits_to_keep: int | Tensor, **inputs: Any
    ) -> SaMoEOutput:
        has_experts = bool(self.config.layout.layers)
        wants_loss = labels is not None and has_experts
        wanted = either(inputs.pop("output_router_logits", None), self.config.output_router_logits)
        found = self.model(**inputs, output_router_logits=wanted or wants_loss)
        hidden = cast(Tensor, found.last_hidden_state)
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        hidden = mark(hidden, done="other", follows="head")
        logits = self.lm_head(hidden)
        aux_loss = None
        if found.router_logits and labels is not None:
            aux_loss = self._router_loss(found.router_logits, inputs.get("attention_mask"))
        loss = None
        if labels is not None:
            loss = self._token_loss(logits, labels)
            if aux_loss is not None:
                loss = loss + aux_loss
        return SaMoEOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            router_logits=found.router_logits if wanted else None,
            dropped=found.dropped,
        )

    def _router_loss(self, logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        real = None
        if attention_mask is not None and attention_mask.dim() == 2:
            new = logits[0].shape[0] // attention_mask.shape[0]  # the mask covers the past too
            real = attention_mask[:, -new:].bool()
        loss = self.config.router_aux_loss_coef * balance_loss(
            logits, self.config.num_experts_per_tok, real
        )
        if self.config.router_z_loss_coef:
            loss = loss + self.config.router_z_loss_coef * z_loss(logits, real)
        return cast(Tensor, loss)

    def _token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean nats of the labelled tokens; a causal model predicts the next one."""
        if self.config.is_causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100
        )


class SaMoEForCausalLM(_LanguageModel, GenerationMixin):
    """Predicts the next token. The loss holds the routers' balance and z-loss.

    Raises:
        RecipeError: a configuration of a masked language model (`is_causal` False).
    """

    def __init__(self, config: SaMoEConfig) -> None:
        if not config.is_causal:
            raise RecipeError(
                "is_causal = False: every position sees those after it, so there is no next token "
                "to predict. Take SaMoEForMaskedLM (AutoModelForMaskedLM)."
            )
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> SaMoEOutput:
        """Logits [B, T, V], and the loss where `labels` [B, T] are given."""
        return self._run(
            labels,
            logits_to_keep,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )


class SaMoEForMaskedLM(_LanguageModel):
    """Predicts masked tokens with bidirectional attention.

    Its configuration is a copy of the one given, with `is_causal` False. The weights of a causal
    model load, as a start for training; the log says so.
    """

    def __init__(self, config: SaMoEConfig) -> None:
        if config.is_causal and "SaMoEForCausalLM" in (config.architectures or ()):
            logger.warning(
                "These weights were trained to predict the next token. SaMoEForMaskedLM lets every "
                "position see all others: train it before use."
            )
        config = copy.deepcopy(config)
        config.is_causal = False
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> SaMoEOutput:
        """Logits [B, T, V]; `labels` are -100 where nothing is masked."""
        return self._run(
            labels,
            0,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits,
            **kwargs,
        )


class SaMoEForSequenceClassification(SaMoEPreTrainedModel):
    """A class per sequence: from the mean of the real tokens, or the last one of a causal model."""

    def __init__(self, config: SaMoEConfig) -> None:
        super().__init__(config)
        self.model = SaMoEModel(config)
        self.score = nn.Linear(config.hidden_size, cast(int, config.num_labels), bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SaMoEOutput:
        """Logits [B, num_labels]; `labels` [B] are class ids."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        h = cast(Tensor, found.last_hidden_state)
        real = (
            torch.ones(h.shape[:2], device=h.device) if attention_mask is None else attention_mask
        )
        if self.config.is_causal:
            last = (real * torch.arange(1, h.shape[1] + 1, device=h.device)).argmax(1)
            pooled = h[torch.arange(len(h), device=h.device), last]
        else:
            weight = real[:, :, None].to(h.dtype)
            pooled = (h * weight).sum(1) / weight.sum(1)
        logits = self.score(pooled)
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return SaMoEOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)


def register() -> None:
    """Make transformers' Auto classes know SaMoE."""
    AutoConfig.register("samoe", SaMoEConfig, exist_ok=True)
    kinds: Sequence[tuple[Any, Any]] = (
        (AutoModel, SaMoEModel),
        (AutoModelForCausalLM, SaMoEForCausalLM),
        (AutoModelForMaskedLM, SaMoEForMaskedLM),
        (AutoModelForSequenceClassification, SaMoEForSequenceClassification),
    )
    for auto, model in kinds:
        auto.register(SaMoEConfig, model, exist_ok=True)
