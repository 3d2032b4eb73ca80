"""What the lines of the log are made of."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from smelt import processes
from smelt.train import distributed, losses
from smelt.train.measure import is_samoe


@dataclass
class Totals:
    """Sums since the last line of the log, and the routing of the last micro-batch."""

    nats: list[Tensor] = field(default_factory=list)  # a micro-batch's part of its step's mean
    balance: list[Tensor] = field(default_factory=list)  # likewise
    steps: int = 0
    seconds: float = 0.0  # of training, when the last line was written
    gradient_norm: float = math.nan  # of the last step, before it was clipped
    counts: list[Tensor] = field(default_factory=list)  # per layer, choices of each expert
    balances: Tensor | None = None  # per layer
    dropped: Tensor | None = None  # per layer


def details(totals: Totals, model: PreTrainedModel) -> dict[str, Any]:
    """Every layer's routing in the last batch, and what a samoe has learnt of sharing."""
    values: dict[str, Any] = {}
    if totals.counts and totals.balances is not None:
        values["routing_entropy"] = [
            round(losses.routing_entropy(layer), 4) for layer in totals.counts
        ]
        (balances,) = processes.total([totals.balances])
        values["load_balance"] = [round(value, 4) for value in balances.tolist()]
    if totals.dropped is not None:
        dropped = processes.total([totals.dropped])[0] / processes.num_processes()
        values["dropped"] = [round(value, 5) for value in dropped.tolist()]
    if is_samoe(model):
        for name in ("alpha", "beta"):
            values[name] = [
                parameter.detach().float().cpu().tolist()
                for parameter in distributed.whole_parameters(model, name)
            ]
    return values
