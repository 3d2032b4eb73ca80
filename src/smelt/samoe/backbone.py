"""The backbone of SaMoE models: embeddings, blocks, the shared experts."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.utils.generic import ModelOutput

from smelt.errors import RecipeError
from smelt.samoe.blocks import RMSNorm, Rotary, SaMoEBlock, StreamLinear, make_norm
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.moe import (
    Router,
    SaMoELayer,
    compute_dtype,
    initial_alpha,
    make_pool,
)
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
    accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides it when it accumulates
    _drawn_alpha: list[Tensor] | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; those that write to the residual stream divided by √(2L), as GPT-2's."""
        std = self.config.initializer_range
        writing = std / (2 * self.config.num_hidden_layers) ** 0.5
        if isinstance(module, nn.Linear | nn.Embedding):
            begin = writing if isinstance(module, StreamLinear) else std
            init.normal_(module.weight, mean=0.0, std=begin)
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
        elif isinstance(module, SaMoELayer):
            if module.beta is not None:
                init.ones_(module.beta)
            if module.alpha is not None:
                init.copy_(module.alpha, self._first_alpha(module.index))

    def _first_alpha(self, index: int) -> Tensor:
        """α of one layer: all layers are drawn together, when the first of them asks."""
        if index == 0 or self._drawn_alpha is None:
            self._drawn_alpha = initial_alpha(cast(SaMoEConfig, self.config))
        return self._drawn_alpha[index]


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
        last = past + h.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, last, device=h.device)[None]
        elif self.embed_positions is not None:
            last = int(position_ids.max()) + 1
        h = self._with_positions(h, position_ids, last)
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
        wanted = either(output_router_logits, self.config.output_router_logits)
        return SaMoEOutput(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=(*streams[:-1], h)
            if either(output_hidden_states, self.config.output_hidden_states)
            else None,
            attentions=tuple(attentions)
            if either(output_attentions, self.config.output_attentions)
            else None,
            router_logits=tuple(logits) if wanted else None,
            dropped=torch.stack(dropped) if wanted and dropped else None,
        )

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        if given is not None or not self.config.is_causal or self.training:
            return given
        wanted = either(use_cache, self.config.use_cache)
        return DynamicCache(config=self.config) if wanted else None

    def _with_positions(self, h: Tensor, position_ids: Tensor, last: int) -> Tensor:
        if self.embed_positions is None:
            return h
        if last > self.config.max_position_embeddings:
            raise RecipeError(
                f"{last} positions: this model has learned "
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


def either(value: bool | None, default: bool | None) -> bool:
    """The value, or where there is none the configuration's default."""
    return bool(default if value is None else value)
