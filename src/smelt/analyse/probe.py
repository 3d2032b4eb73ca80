"""A model run on text to see how alike its layers are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from smelt.analyse.gradients import cosines
from smelt.analyse.ground import Batch
from smelt.analyse.moments import numbers
from smelt.analyse.similarity import Contingency, LinearCKA, OutputCosine
from smelt.compress.calibrate import Progress
from smelt.samoe.backbone import SaMoEModel
from smelt.samoe.dispatch import largest
from smelt.samoe.moe import SaMoELayer
from smelt.samoe.pool import ExpertPool
from smelt.train.measure import num_choices

WIDEST = 24_576
"""(blocks + 1) · D beyond which CKA's Gram (8 bytes squared: 4.8 GB) is not made."""


@torch.no_grad()
def similarity(
    model: PreTrainedModel, batches: Sequence[Batch], *, progress: Progress | None = None
) -> dict[str, Any]:
    """Linear CKA between blocks, cosine between MoE layers' outputs, agreement of routings.

    In evaluation mode: no capacity. The hidden states are those after the embeddings and after
    every block, the last one after the final norm. Every MoE layer, with its own router, is run on
    the inputs of every MoE layer.

    Returns:
        For JSON; what the model has not got, or what would be too large, is left out and named in
        `left_out`.
    """
    base, left_out = model.base_model, []
    layers = base.moe_layers() if isinstance(base, SaMoEModel) else []
    choices = num_choices(model)
    states = (model.config.num_hidden_layers + 1) * model.config.hidden_size
    cka = LinearCKA() if states <= WIDEST else None
    if cka is None:
        left_out.append(f"CKA: (blocks + 1) · D = {states:,} is beyond {WIDEST:,}")
    outputs, tables = OutputCosine(), _Tables(choices)
    device = next(model.parameters()).device
    model.eval()
    with _inputs_of(layers) as seen:
        for number, batch in enumerate(batches):
            found = model(
                input_ids=batch["input_ids"].to(device),
                output_hidden_states=True,
                output_router_logits=True,
                use_cache=False,
            )
            if cka is not None:
                cka.add(torch.stack([h.flatten(0, 1).float() for h in found.hidden_states]))
            tables.add(found.get("router_logits") or ())
            for x, *_ in seen.values() if len(layers) > 1 else ():
                outputs.add(torch.stack([_run(layer, x, seen) for layer in layers]))
            if progress is not None:
                progress("", number + 1, len(batches))
    report: dict[str, Any] = {"num_tokens": sum(b["input_ids"].numel() for b in batches)}
    if cka is not None:
        report["cka"] = numbers(cka.result())
    if len(layers) > 1:
        report["output_cosine"] = numbers(outputs.result())
        weights = weight_cosine(base) if isinstance(base, SaMoEModel) else None
        report |= {} if weights is None else {"weight_cosine": numbers(weights)}
    return report | tables.result() | {"left_out": left_out}


@contextmanager
def _inputs_of(layers: Sequence[SaMoELayer]) -> Iterator[dict[int, tuple[Any, ...]]]:
    """Within: what each MoE layer was last called with, by its number."""
    seen: dict[int, tuple[Any, ...]] = {}

    def keeping(index: int) -> Any:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[index] = inputs

        return before

    handles = [layer.register_forward_pre_hook(keeping(i)) for i, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _run(layer: SaMoELayer, x: Tensor, seen: dict[int, tuple[Any, ...]]) -> Tensor:
    """A layer's output [N, D] for another one's inputs."""
    _, *own = seen[layer.index]
    output: Tensor = layer.forward(x, *own).output  # not a call: the hooks are for the model's
    return output.flatten(0, 1).float()


class _Tables:
    """First choices of every pair of MoE layers, and tokens per expert of each."""

    def __init__(self, num_choices: int) -> None:
        self.num_choices = num_choices
        self.tables: dict[tuple[int, int], Contingency] = {}
        self.load: list[Tensor] = []

    def add(self, logits: Sequence[Tensor]) -> None:
        chosen = [largest(layer.float().softmax(-1), self.num_choices) for layer in logits]
        sizes = [layer.shape[-1] for layer in logits]
        for i, first in enumerate(chosen):
            load = torch.bincount(first.flatten().cpu(), minlength=sizes[i])
            if i == len(self.load):
                self.load.append(torch.zeros_like(load))
            self.load[i] += load
            for j, second in enumerate(chosen[: i + 1]):
                table = self.tables.setdefault((i, j), Contingency(sizes[i], sizes[j]))
                table.add(first[:, 0], second[:, 0])

    def result(self) -> dict[str, Any]:
        if not self.tables:
            return {}
        L = len(self.load)
        information = torch.zeros(L, L, dtype=torch.float64)
        same, chance = information.clone(), information.clone()
        for (i, j), table in self.tables.items():
            information[i, j] = information[j, i] = table.mutual_information()
            if len(set(table.counts.shape)) == 1:
                share = table.same()
                same[i, j], same[j, i] = share[0], share[0]
                chance[i, j], chance[j, i] = share[1], share[1]
        return {
            "tokens_per_expert": [load.tolist() for load in self.load],
            "mutual_information": numbers(information),
            "same_expert": numbers(same),
            "same_expert_by_chance": numbers(chance),
        }


def weight_cosine(base: SaMoEModel) -> Float[Tensor, "L L"] | None:
    """Cosine between the layers' combined down projections, all experts as one vector.

    Activation mixing runs α_c · W2_c side by side, so that ⟨l, m⟩ = Σ_c α_lc α_mc ‖W2_c‖²; weight
    mixing adds them, so that ⟨l, m⟩ = Σ_cd α_lc α_md ⟨W2_c, W2_d⟩. None: layers have no α, and
    expert ids of one layer mean nothing in another.
    """
    layers = base.moe_layers()
    if not base.config.layout.is_mixed or len(base.pools) != 1:
        return None
    pool = cast(ExpertPool, base.pools[0])
    E, D, _ = pool.down.shape
    down = pool.down.detach().view(E, D, pool.entries, -1)
    inner = torch.einsum("edpf,edqf->epq", down, down).double()
    if base.config.mix == "activation":
        inner = inner * torch.eye(pool.entries, dtype=inner.dtype, device=inner.device)
    alpha = torch.stack([_of_down(layer, E) for layer in layers])  # [L, E, P]
    return cosines(torch.einsum("lep,epq,meq->lm", alpha, inner, alpha)).cpu()


def _of_down(layer: SaMoELayer, num_experts: int) -> Float[Tensor, "E P"]:
    """The factors of a layer's down projections."""
    alpha = cast(Tensor, layer.alpha).detach().double()
    if layer.alpha_scope == "expert":
        return alpha.T
    column = alpha[:, -1] if layer.alpha_scope == "matrix" else alpha
    return column.expand(num_experts, -1)
