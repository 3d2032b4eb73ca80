"""The order of an expert's hidden units that best matches another expert's: one assignment each.

An expert computes the same function after its F hidden units are reordered, so experts are put in
one order before their weights are averaged. The cost matrix is a few GEMMs; the assignment is
scipy's, which releases the GIL (since 1.12): solves run in threads of this process and nothing is
copied to another. Each is deterministic, so the number of workers changes no result.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from smelt.experts import ExpertBank, hidden
from smelt.routing import LayerStats

Cost = Callable[[ExpertBank, int, int], Float[Tensor, "F F"]]
"""`(bank, reference, expert)` → how well unit j of the expert (column) fits unit i (row)."""


def weight_cost(bank: ExpertBank, reference: int, expert: int) -> Float[Tensor, "F F"]:
    """Inner products of two experts' hidden units: their rows of up and gate, columns of down.

    A bias of up or gate is one more column. All in float32.

    Source: M-SMoE, arXiv:2310.01334, section 3.2, after Git Re-Basin; the gated form is ours.
    """
    cost = torch.zeros(bank.hidden_size, bank.hidden_size, device=bank.up.device)
    for name in ("up", "gate", "down"):
        if (weight := getattr(bank, name)) is None:
            continue
        ours, theirs = weight[reference].float(), weight[expert].float()
        if name == "down":
            ours, theirs = ours.T, theirs.T
        cost.addmm_(ours, theirs.T)
    for bias in (bank.up_bias, bank.gate_bias):
        if bias is not None:
            cost.addr_(bias[reference].float(), bias[expert].float())
    return cost


def activation_cost(stats: LayerStats) -> Cost:
    """A cost by what the units do: the correlation of two experts' hidden activations.

    Over the sampled tokens that were routed to either of the two. A unit that never varies there
    correlates with nothing (0). Two experts that fewer than two tokens reached are compared by
    weight.
    """

    def cost(bank: ExpertBank, reference: int, expert: int) -> Float[Tensor, "F F"]:
        choice = stats.sample_choice
        routed = ((choice == reference) | (choice == expert)).any(1)
        if int(routed.sum()) < 2:
            return weight_cost(bank, reference, expert)
        x = stats.input_sample[routed].to(bank.up)
        return _standardised(hidden(bank, reference, x)).T @ _standardised(hidden(bank, expert, x))

    return cost


def joint_cost(stats: LayerStats) -> Cost:
    """The cosines of two units' weights, and the correlation of what they do: the sum of both.

    Source: REAM, arXiv:2604.04356, which aligns on weights and activations; putting both on the
    scale of a cosine is ours.
    """
    by_activation = activation_cost(stats)

    def cost(bank: ExpertBank, reference: int, expert: int) -> Float[Tensor, "F F"]:
        weights = weight_cost(bank, reference, expert)
        norms = [_unit_norms(bank, e) for e in (reference, expert)]
        scale = norms[0][:, None] * norms[1]
        cosine = torch.where(scale > 0, weights / scale, 0.0)
        return cosine + by_activation(bank, reference, expert)

    return cost


def _unit_norms(bank: ExpertBank, expert: int) -> Float[Tensor, " F"]:
    """The norm of each hidden unit's weights, as `weight_cost` compares them."""
    own = {name: t[expert].float() for name, t in bank.tensors().items() if name != "down_bias"}
    parts = [
        own[n].square().sum(0 if n == "down" else -1) if own[n].dim() == 2 else own[n].square()
        for n in own
    ]
    return torch.stack(parts).sum(0).sqrt()


BY_ACTIVATIONS: dict[str, Callable[[LayerStats], Cost]] = {
    "activations": activation_cost,
    "both": joint_cost,
}
"""Alignments that read the input sample."""


class Aligner:
    """Finds hidden-unit orders, several at a time; one pool for all layers. A context manager.

    Args:
        workers: solves at a time; None: one per core.
        memory: bytes that cost matrices may take together; None: half of what is available now.
            One solve takes at most 20·F² bytes.
    """

    def __init__(self, workers: int | None = None, memory: int | None = None) -> None:
        self._workers = max(1, workers or _cores())
        self._memory = memory
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Aligner":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def orders(
        self,
        bank: ExpertBank,
        labels: Int[Tensor, " E"],
        dominants: Int[Tensor, " G"],
        *,
        reference: str = "dominant",
        cost: Cost = weight_cost,
    ) -> Int[Tensor, "E F"]:
        """For `merge_groups`: new hidden unit j of expert e is unit order[e, j].

        Args:
            reference: "dominant": each member follows the dominant expert of its group. "first":
                every member of every group, the dominant too, follows expert 0 of the layer (the
                paper's Algorithm 1).

        A group of one, a dropped expert and a reference keep the order they have.
        """
        order = torch.arange(bank.hidden_size).repeat(len(labels), 1)
        for expert, found in self.solve(bank, pairs(labels, dominants, reference), cost):
            order[expert] = found
        return order

    def solve(
        self, bank: ExpertBank, wanted: list[tuple[int, int]], cost: Cost = weight_cost
    ) -> Iterator[tuple[int, Int[Tensor, " F"]]]:
        """The order of each `(reference, expert)` wanted, in turn; few cost matrices at a time."""
        workers = self.at_once(bank.hidden_size, len(wanted))
        if workers <= 1:
            for reference, expert in wanted:
                yield expert, _assign(_negated(cost(bank, reference, expert)))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="smelt-align")
        waiting: deque[tuple[int, Future[Tensor]]] = deque()
        for reference, expert in wanted:
            if len(waiting) == workers:
                done, future = waiting.popleft()
                yield done, future.result()
            matrix = _negated(cost(bank, reference, expert))
            waiting.append((expert, self._pool.submit(_assign, matrix)))
        for done, future in waiting:
            yield done, future.result()

    def at_once(self, hidden_size: int, wanted: int) -> int:
        """How many solves of F units may run at a time, of so many wanted."""
        return max(1, min(self._workers, wanted, self._fitting(hidden_size)))

    def _fitting(self, hidden_size: int) -> int:
        """How many solves of F units fit in memory at once; at least one."""
        memory = available_memory() // 2 if self._memory is None else self._memory
        return max(1, memory // (20 * hidden_size**2))


def pairs(
    labels: Int[Tensor, " E"], dominants: Int[Tensor, " G"], reference: str = "dominant"
) -> list[tuple[int, int]]:
    """The `(reference, expert)` pairs to align: none for a group of one or a dropped expert."""
    size = torch.bincount(labels[labels >= 0], minlength=len(dominants)).tolist()
    found = []
    for expert, group in enumerate(labels.tolist()):
        if group < 0 or size[group] == 1:
            continue
        anchor = int(dominants[group]) if reference == "dominant" else 0
        if expert != anchor:
            found.append((anchor, expert))
    return found


def _negated(cost: Float[Tensor, "F F"]) -> NDArray[np.float64]:
    """−C as float64 in memory of its own: scipy then minimises it without another copy."""
    matrix: NDArray[np.float64] = cost.double().neg_().cpu().numpy()
    return matrix


def _assign(matrix: NDArray[np.float64]) -> Tensor:
    """The column of each row in the assignment of least cost."""
    return torch.from_numpy(linear_sum_assignment(matrix)[1])


def _standardised(h: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
    """Each unit's activations, centred, at unit norm; zero for a unit that does not vary."""
    h = h.float()
    h = h - h.mean(0)
    norm = h.norm(dim=0)
    return h * torch.where(norm > 0, 1 / norm, 0.0)


def _cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that could be had now, or 8 GiB where the system does not say."""
    try:
        table = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 8 << 30
    found = re.search(r"MemAvailable:\s*(\d+) kB", table)
    return int(found[1]) << 10 if found else 8 << 30
