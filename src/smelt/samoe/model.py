"""SaMoE as transformers citizens: the backbone, a causal and a masked language model, a classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
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
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.utils import ModelOutput

from smelt.errors import RecipeError
from smelt.samoe.blocks import RMSNorm, Rotary, SaMoEBlock, make_norm
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.moe import (
    Router,
    SaMoELayer,
    balance_loss,
    compute_dtype,
    initial_alpha,
    make_pool,
    z_loss,
)
from smelt.samoe.phases import mark
from smelt.samoe.pool import ExpertPool


@dataclass
class SaMoEOutput(ModelOutput):
    """What the models return; `dropped` [L] is the share of choices beyond capacity."""

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None  # [B·T, E] of every MoE layer
    dropped: Tensor | None = None


class SaMoEPreTrainedModel(PreTrainedModel):
    """What all SaMoE models share with transformers."""

    config_class = SaMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SaMoEBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; those that write to the residual stream divided by √(2L), as GPT-2's."""
        std = self.config.initializer_range
        writing = std / (2 * self.config.num_hidden_layers) ** 0.5
        if isinstance(module, nn.Linear | nn.Embedding):
            is_writing = getattr(module, "writes_to_stream", False)
            init.normal_(module.weight, mean=0.0, std=writing if is_writing else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | RMSNorm):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, ExpertPool):
            init.normal_(module.up, mean=0.0, std=std)
            init.normal_(module.down, mean=0.0, std=writing)
            if module.gate is not None:
                init.normal_(module.gate, mean=0.0, std=std)
            for bias in (module.up_bias, module.gate_bias, module.down_bias):
                if bias is not None:
                    init.zeros_(bias)
        elif isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, SaMoELayer) and module.beta is not None:
            init.ones_(module.beta)
        elif isinstance(module, SaMoEModel) and module.config.layout.is_mixed:
            for layer, alpha in zip(module.moe_layers(), initial_alpha(self.config), strict=True):
                init.copy_(cast(nn.Parameter, layer.alpha), alpha)


class SaMoEModel(SaMoEPreTrainedModel):
    """Embeddings, blocks and the shared experts; hidden states out."""

    def __init__(self, config: SaMoEConfig) -> None:
        super().__init__(config)
        layout = config.layout
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        )
        self.rotary = None if learned else Rotary(config)
        self.pools = nn.ModuleList([make_pool(config, layout.groups[i]) for i in layout.shared()])
        num_experts = layout.layers[0].experts if layout.layers else 0
        self.router = (
            Router(num_experts, config.hidden_size)
            if config.shared_router and layout.layers
            else None
        )
        index = {layer.block: i for i, layer in enumerate(layout.layers)}
        self.layers = nn.ModuleList(
            [SaMoEBlock(config, i, index.get(i)) for i in range(config.num_hidden_layers)]
        )
        for block in self.layers:
            block.attention.o_proj.writes_to_stream = True
            for dense in (block.mlp, block.residual):
                if hasattr(dense, "down_proj"):
                    dense.down_proj.writes_to_stream = True
        shared = {group: i for i, group in enumerate(layout.shared())}
        self._pool_of = {
            layer.block: shared[layer.group] for layer in layout.layers if layer.group in shared
        }
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def moe_layers(self) -> list[SaMoELayer]:
        """The layers with experts, in order."""
        return [block.mlp for block in self.layers if isinstance(block.mlp, SaMoELayer)]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> SaMoEOutput:
        """Hidden states, and what the routers did.

        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, D].
            attention_mask: [B, past + T], 1: a real token.
        """
        for name in ("return_dict", "cache_position"):
            kwargs.pop(name, None)
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + h.shape[1], device=h.device)[None]
        h = self._with_positions(h, position_ids, past)
        positions = self.rotary(h, position_ids) if self.rotary is not None else None
        mask, real = self._masks(h, attention_mask, position_ids, cache)
        pools = [pool(compute_dtype(h)) for pool in self.pools]
        streams, attentions, logits, dropped = [h], [], [], []
        for i, block in enumerate(self.layers):
            pool = pools[self._pool_of[i]] if i in self._pool_of else None
            h, routed, share, weights = block(
                h, pool, self.router, real, positions, mask, past_key_values=cache, **kwargs
            )
            streams.append(h)
            attentions.append(weights)
            if routed is not None:
                logits.append(routed)
                dropped.append(share)
        h = self.norm(h)
        wanted = _or(output_router_logits, self.config.output_router_logits)
        return SaMoEOutput(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=(*streams[:-1], h)
            if _or(output_hidden_states, self.config.output_hidden_states)
            else None,
            attentions=tuple(attentions)
            if _or(output_attentions, self.config.output_attentions)
            else None,
            router_logits=tuple(logits) if wanted else None,
            dropped=torch.stack(dropped) if wanted and dropped else None,
        )

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        if given is not None or not self.config.is_causal or self.training:
            return given
        wanted = _or(use_cache, self.config.use_cache)
        return DynamicCache(config=self.config) if wanted else None

    def _with_positions(self, h: Tensor, position_ids: Tensor, past: int) -> Tensor:
        if self.embed_positions is None:
            return h
        if past + h.shape[1] > self.config.max_position_embeddings:
            raise RecipeError(
                f"{past + h.shape[1]} positions: this model has learned "
                f"{self.config.max_position_embeddings}. Give it shorter sequences."
            )
        embedded: Tensor = h + self.embed_positions(position_ids)
        return embedded

    def _masks(
        self, h: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The attention's own mask, and which of the T tokens are real (None: all are)."""
        real = None
        if attention_mask is not None and attention_mask.dim() == 2:
            if bool(attention_mask.all()):
                attention_mask = None
            else:
                real = attention_mask[:, -h.shape[1] :].bool()
        make = create_causal_mask if self.config.is_causal else create_bidirectional_mask
        mask = make(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        return cast("Tensor | None", mask), real


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


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
        wanted = _or(inputs.pop("output_router_logits", None), self.config.output_router_logits)
        found = self.model(**inputs, output_router_logits=wanted or wants_loss)
        hidden = cast(Tensor, found.last_hidden_state)
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        hidden = mark(hidden, done="other", follows="head")
        logits = self.lm_head(hidden)
        aux_loss = None
        if found.router_logits:
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
        real = None if attention_mask is None else attention_mask[:, -1:].bool()
        if attention_mask is not None and attention_mask.numel() == logits[0].shape[0]:
            real = attention_mask.bool()
        else:
            real = None
        loss = self.config.router_aux_loss_coef * balance_loss(
            logits, self.config.num_experts_per_tok, real
        )
        if self.config.router_z_loss_coef:
            loss = loss + self.config.router_z_loss_coef * z_loss(logits)
        return cast(Tensor, loss)

    def _token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean nats of the labelled tokens; a causal model predicts the next one."""
        if self.config.is_causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100
        )


class SaMoEForCausalLM(_LanguageModel, GenerationMixin):
    """Predicts the next token. The loss holds the routers' balance and z-loss."""

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
    """Predicts masked tokens with bidirectional attention; `config.is_causal` becomes False."""

    def __init__(self, config: SaMoEConfig) -> None:
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
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
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
