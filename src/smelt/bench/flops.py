"""FLOPs as a model executes them: 2 × the multiply-adds of its matrix products."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def executed(
    model: nn.Module, job: Callable[[], object], parts: Sequence[str] = ()
) -> tuple[float, float]:
    """FLOPs of one call of `job`, and those of them within these modules of the model.

    Attention over masked tokens counts, as kernels for whole rectangles execute it.
    """
    aten = torch.ops.aten
    own: dict[Any, Any] = {
        aten._grouped_mm: grouped_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        job()
    by_module, root = counter.get_flop_counts(), type(model).__name__
    inside = sum(sum(by_module.get(f"{root}.{part}", {}).values()) for part in parts)
    return float(counter.get_total_flops()), float(inside)


def grouped_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Of rows [M, K] times matrices [G, K, N], every row with one of them: torch counts none."""
    return 2 * a[0] * a[1] * b[-1]


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of the CPU's fused attention [B, H, T, D], which torch counts none of either."""
    rows = query[0] * query[1] * query[2]
    return 2 * rows * key[2] * (query[3] + value[3])
