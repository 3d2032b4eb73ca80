"""Initial values that let a small Switch model begin: routers that move, attention that matches.

transformers draws the weights of `switch_transformers` as T5's were drawn, for a model of a
thousand times the tokens that a small one sees.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from smelt.checkpoint.bind import find_layers

SHARPNESS = (
    0.2  # of the keys' weights in the queries': a token's own logit is 0.2 · width of a head
)

NEARNESS = 7.0  # logit of a neighbour, for the heads that see it


@torch.no_grad()
def calm_routers(model: PreTrainedModel) -> None:
    """Make the routers 1/√D as wide as transformers draws them, in place.

    There every weight has a standard deviation of 1, and the logits one of √D: the softmax is one
    expert from the first step on, and no balance loss moves it.
    """
    for layer in find_layers(model):
        for parameter in model.get_submodule(layer.router or "").parameters():
            parameter.mul_(parameter.shape[-1] ** -0.5)


@torch.no_grad()
def match_tokens(model: PreTrainedModel) -> None:
    """Let attention begin by matching equal tokens and copying their neighbours, in place.

    Of the heads that see the input, those of the encoder and the ones across, half attend to the
    tokens that are equal to their own: their queries are a share of their keys. Of the encoder's
    others, half see the next token and half the one before. All but the last kind write what they
    read. Together they find where a question's words stand in a text, and what stands beside them:
    what fine-tuning on questions needs, and what a small model had not come upon by itself in four
    million tokens (docs/tasks.md). Heads of the decoder's self-attention stay as they are drawn.

    Source: mimetic initialisation, Trockman & Kolter 2023, arXiv:2305.09828. Differs in that
    queries are exactly proportional to keys, that the sign is the one that copies, and in the heads
    that see neighbours.
    """
    for name, module in model.named_modules():
        if not all(isinstance(getattr(module, part, None), nn.Linear) for part in "qkvo"):
            continue
        is_encoder = name.startswith("encoder.")
        if not is_encoder and name.endswith("SelfAttention"):
            continue
        heads, width = module.n_heads, module.key_value_proj_dim
        matching = heads // 2 * width
        copying = (heads - heads // 4) * width if is_encoder else matching
        module.q.weight[:matching] = SHARPNESS * module.k.weight[:matching]
        module.o.weight[:, :copying] = module.v.weight[:copying].T
        if is_encoder and module.has_relative_attention_bias:  # the layers of a stack share it
            bias = module.relative_attention_bias.weight  # [buckets, heads]
            bias[len(bias) // 2 + 1, heads // 2 : heads - heads // 4] += NEARNESS
            bias[1, heads - heads // 4 :] += NEARNESS
