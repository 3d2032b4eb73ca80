"""How many rows of S stay at a step of healing, and what a row is worth: pure functions.

W ≈ U V + S for every matrix of a merged expert; whole rows of S (output neurons) are dropped while
the model heals: `compress.decompose.choose_rows` says which, `heal_rows` does it to a model.

Source: MC-SMoE, arXiv:2310.01334, §3.3, whose importance is that of LoSparse, arXiv:2306.11222.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def bounds(steps: int, initial: float, final: float) -> tuple[int, int]:
    """T_i and T_f in steps: all rows stay up to T_i, the last share holds after T − T_f."""
    return round(steps * initial), round(steps * final)


def is_too_short(steps: int, initial: float, final: float) -> bool:
    """Whether T ≤ T_i + T_f, in steps or as shares, which leaves no step for the rows to go."""
    return initial + final >= 1 or steps <= sum(bounds(steps, initial, final))


def keep_share(step: int, steps: int, *, keep: float, initial: float, final: float) -> float:
    """The share of the entries of S that stays after a step, falling as a cubic.

    1 up to T_i, `keep` after T − T_f, between them
    keep + (1 − keep) · (1 − (t − T_i) / (T − T_i − T_f))³.

    Args:
        step: t, the first one is 1.
        steps: T.
        keep: p_f, the share at the end.
        initial: T_i as a share of T.
        final: T_f as a share of T.

    Source: MC-SMoE, §3.3. The printed formula has a typo; this one is continuous at both ends.
    """
    first, last = bounds(steps, initial, final)
    assert steps > first + last
    if step <= first:
        return 1.0
    if step > steps - last:
        return keep
    return keep + (1 - keep) * (1 - (step - first) / (steps - first - last)) ** 3


def row_importance(
    rows: Float[Tensor, "G O I"], gradient: Float[Tensor, "G O I"]
) -> Float[Tensor, "G O"]:
    """What each row of S is worth at this step: mean_j |S_ij · ∂L/∂S_ij|."""
    return (rows * gradient).abs_().mean(-1)


def running(
    importance: Float[Tensor, "G O"], new: Float[Tensor, "G O"], decay: float
) -> Float[Tensor, "G O"]:
    """The running mean after another step; it starts at zero, which scales all rows alike."""
    return torch.lerp(new, importance, decay)
