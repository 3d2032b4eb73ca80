"""The rows of S in a model that heals: opened at the start, pruned step by step, closed at the end.

Importances are read from the gradients before the optimiser's step, masks act on the weights after
it: a row that is dropped is zero from then on, so its importance can only fall.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smelt.checkpoint.factored import close_model, dense_weights, is_factored, open_model
from smelt.checkpoint.factored_forward import matrices
from smelt.compress.decompose import choose_rows, truncated_svd
from smelt.errors import RecipeError
from smelt.train.heal_settings import DecomposeSettings
from smelt.train.sparsify import keep_share, row_importance, running


@dataclass
class Matrix:
    """One matrix of one layer's experts: its S, and what is known of its rows."""

    module: str  # the experts module
    name: str  # gate, up or down
    rows: nn.Parameter  # S [G, O, I]
    importance: Tensor  # [G, O]
    mask: Tensor  # bool [G, O]: the rows that stay

    @property
    def key(self) -> str:
        """Its name in a checkpoint."""
        return f"{self.module}.{self.name}"


class PrunedRows:
    """All S of an open model.

    Args:
        model: mapped or factored; opened in place.
        settings: rank, schedule, decay.
        steps: of the run.

    Raises:
        RecipeError: nothing to decompose, or a rank that a matrix cannot have.
    """

    def __init__(self, model: PreTrainedModel, settings: DecomposeSettings, steps: int) -> None:
        self.model, self.settings, self.steps = model, settings, steps
        self.share = 1.0  # of the entries of S that stay
        ranks = ranks_of(model, settings.rank, settings.excluded)
        open_model(model, ranks, truncated_svd)
        self.matrices = [
            _matrix(model, module, name) for module, own in ranks.items() for name in own
        ]

    def observe(self) -> None:
        """Take in the gradients of this step, before anything is done with them."""
        for one in self.matrices:
            assert one.rows.grad is not None
            new = row_importance(one.rows.detach(), one.rows.grad)
            known = one.importance.to(new.device)  # the Trainer may have moved the model
            one.importance = running(known, new, self.settings.decay)

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """Choose the rows that stay after a step (the first is 1), and clear the others.

        Raises:
            RecipeError: an importance is NaN or Inf.
        """
        own = self.settings
        self.share = keep_share(
            step, self.steps, keep=own.keep, initial=own.initial, final=own.final
        )
        self._check(step)
        if self.share >= 1:
            return
        masks = choose_rows(
            [one.importance for one in self.matrices],
            [one.rows.shape[-1] for one in self.matrices],
            self.share,
        )
        for one, mask in zip(self.matrices, masks, strict=True):
            one.mask = mask
            one.rows.view(-1, one.rows.shape[-1])[~mask.flatten()] = 0.0

    def _check(self, step: int) -> None:
        sums = torch.stack([one.importance.sum() for one in self.matrices])
        if bool(torch.isfinite(sums).all()):
            return
        bad = next(one for one in self.matrices if not torch.isfinite(one.importance).all())
        raise RecipeError(
            f"Healing stopped at step {step}: importances of {bad.key} are NaN or Inf, so no row "
            "can be chosen. Lower learning_rate, or heal without decompose first."
        )

    def close(self) -> None:
        """Pack what is kept; the model is an ordinary compact one from here on."""
        masks: dict[str, dict[str, Tensor]] = {}
        for one in self.matrices:
            masks.setdefault(one.module, {})[one.name] = one.mask
        close_model(self.model, masks)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        found = {f"importance.{one.key}": one.importance for one in self.matrices}
        return found | {f"mask.{one.key}": one.mask for one in self.matrices}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        for one in self.matrices:
            device = one.rows.device
            one.importance = state[f"importance.{one.key}"].to(device)
            one.mask = state[f"mask.{one.key}"].to(device)


def ranks_of(
    model: PreTrainedModel, rank: int, excluded: Collection[int | str] = ()
) -> dict[str, dict[str, int]]:
    """The rank of every matrix to decompose: by experts module, by matrix.

    Args:
        model: mapped or factored.
        rank: of every matrix.
        excluded: layers left whole, by name or by position.

    Raises:
        RecipeError: no merged experts, no such layer, or the rank is above min(D, F).
    """
    names = list(getattr(model.config, "mapped_experts", None) or ())
    if not names:
        raise RecipeError(
            f"decompose: this {model.config.model_type} is in stock form, which has no place for "
            "low-rank experts. Compress with --form mapped, and heal that."
        )
    left = _excluded([n for n, _ in model.named_modules() if n in names], excluded)
    found: dict[str, dict[str, int]] = {}
    for name in names:
        if name in left:
            continue
        shapes = _shapes(model.get_submodule(name))
        for m, (out, into, own) in shapes.items():
            if own is not None and own != rank:
                raise RecipeError(
                    f"decompose.rank = {rank}: {name} is decomposed already, {m} at rank {own}. "
                    f"Ask for rank {own}."
                )
            if rank > min(out, into):
                raise RecipeError(
                    f"decompose.rank = {rank}: {m} of {name} is {out} × {into}, its rank is at "
                    f"most {min(out, into)}. Lower decompose.rank."
                )
        found[name] = dict.fromkeys(shapes, rank)
    return found


def _excluded(names: Sequence[str], excluded: Collection[int | str]) -> set[str]:
    """The experts modules of layers named, as a compression names them."""
    layers = {name.removesuffix(".experts"): name for name in names}
    by: dict[int | str, str] = dict(enumerate(names))
    for layer, name in layers.items():
        by[layer] = by[name] = name
    for one in excluded:
        if one not in by:
            raise RecipeError(
                f"decompose.excluded: there is no layer {one!r}. Layers are 0 to {len(names) - 1}, "
                f"or {', '.join(layers)}."
            )
    if len({by[one] for one in excluded}) == len(names):
        raise RecipeError("decompose.excluded: every layer is left whole: drop decompose.")
    return {by[one] for one in excluded}


def _shapes(experts: nn.Module) -> dict[str, tuple[int, int, int | None]]:
    """By matrix: out, in, and the rank it has already, if any."""
    params: Any = experts._parameters
    if is_factored(experts):
        return {
            m: (params[f"{m}_u"].shape[1], params[f"{m}_v"].shape[2], params[f"{m}_u"].shape[2])
            for m in matrices(experts)
        }
    weights = dense_weights(experts, lambda p: p.detach())
    return {
        m: (w.shape[1], w.shape[2], None) for m, w in weights.items() if not m.endswith("_bias")
    }


def _matrix(model: PreTrainedModel, module: str, name: str) -> Matrix:
    rows: nn.Parameter = model.get_submodule(module).get_parameter(f"{name}_s")
    zeros = torch.zeros(rows.shape[:2], device=rows.device)
    return Matrix(module, name, rows, zeros, torch.ones_like(zeros, dtype=torch.bool))
