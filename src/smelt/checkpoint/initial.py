"""Initial values that let a small Switch model begin: routers that can move, attention that matches.

transformers draws the weights of `switch_transformers` as T5's were drawn, for a model of a
thousand times the tokens that a small one sees.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from smelt.checkpoint.bind import find_layers

SHARPNESS = 0.2  # of the keys' weights in the queries': a token's own logit is 0.2 · width of a head


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
    """Let half of the heads of encoder and cross attention begin by attending to equal tokens.

    Their queries are a share of their keys, and their outputs give back what their values took:
    attention begins as matching, and what it does as copying, which questions about a text are
    made of. Heads of the decoder's self-attention stay as they are drawn.

    Source: mimetic initialisation, Trockman & Kolter 2023, arXiv:2305.09828. Differs in that
    queries are exactly proportional to keys, in half of the heads, with the sign that copies.
    """
    for name, module in model.named_modules():
        parts = [getattr(module, part, None) for part in "qkvo"]
        q, k, v, o = parts
        if not all(isinstance(part, nn.Linear) for part in parts) or (
            model.config.is_encoder_decoder
            and name.startswith("decoder.")
            and name.endswith("SelfAttention")
        ):
            continue
        width = module.n_heads // 2 * module.key_value_proj_dim
        q.weight[:width] = SHARPNESS * k.weight[:width]
        o.weight[:, :width] = v.weight[:width].T
