"""What becomes of every expert of a checkpoint: a value, and a JSON file that a person can read.

`decide.make_plan` makes one from statistics and a recipe; `apply` carries it out.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from smelt.compress.methods import Method
from smelt.errors import PlanError
from smelt.recipe import CompressRecipe

VERSION = 1
"""Of the file; a plan of another version is refused."""


@dataclass(frozen=True)
class LayerFacts:
    """What a plan must know about one MoE layer: read off the checkpoint's headers, no weights."""

    name: str
    block: int
    num_experts: int
    top_k: int
    model_size: int  # D
    hidden_size: int  # F
    expert_params: int  # of one expert
    expert_bytes: int  # of one expert, on disk
    num_router_params: int  # per expert: its router row and biases
    router_bytes: int  # per expert: everything else with an expert axis, on disk
    map_bytes: int = 8  # per expert: what the mapped form adds (an int64 in expert_map)
    n_group: int = 1
    topk_group: int = 1
    min_per_router_group: int = 1
    has_gate: bool = True
    bias_params: int = 0  # of one expert, among `expert_params`

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns, out and in, of every matrix of one expert."""
        D, F = self.model_size, self.hidden_size
        gate = {"gate": (F, D)} if self.has_gate else {}
        return {**gate, "up": (F, D), "down": (D, F)}

    @property
    def bytes_per_param(self) -> int:
        """Of an expert's weights on disk."""
        return self.expert_bytes // self.expert_params


class _Strict(BaseModel):
    """Frozen; nothing unknown, nothing converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class MatrixFactors(_Strict):
    """One matrix of every expert of a layer: U V of some rank, and whole rows of S."""

    rank: int
    rows: tuple[int, ...] | None = None  # kept in each stored expert; None: not decided yet


class LayerFit(_Strict):
    """What reconstruction did to a layer: relative squared errors of its output, held out."""

    before: float
    after: float
    solved: float | None = None  # after the closed form; None: it was not tried
    steps: int
    best_step: int  # whose state is kept; 0: that of the closed form, or the start
    tokens: int
    parameters: int
    ended: Literal["done", "no better", "diverged", "out of time"]


class LayerPlan(_Strict):
    """One MoE layer: who stays, who joins whom, and with what weight."""

    name: str
    operator: Literal["merge", "drop", "constant", "keep"]  # keep: every expert stays as it is
    num_experts: int
    num_groups: int
    dominants: tuple[int, ...]  # expert ids, ascending; group g is that of dominants[g]
    labels: tuple[int, ...]  # by expert; -1: dropped
    weights: tuple[float, ...]  # by expert: its share in its group; 0: dropped
    similarity: tuple[float, ...]  # by expert: to its group's dominant; 0: dropped
    protected: tuple[int, ...] = ()
    router_groups: int = 1  # runs of experts that no group crosses
    align: str
    reference: str
    rule: str = "sum"
    repair: bool = False
    router: str
    factors: dict[str, MatrixFactors] | None = None  # by matrix: gate, up, down; None: stay whole
    hidden_units: int | None = None  # F of the stored experts, where some are dropped
    bytes_before: int  # experts, router rows and the map, on disk
    bytes_after: int
    fit: LayerFit | None = None  # once it is applied
    tried: dict[str, float] | None = None  # by `auto`: errors after a short fit, best first

    @property
    def num_constants(self) -> int:
        """Experts whose place a vector takes."""
        return self.num_experts - self.num_groups if self.operator == "constant" else 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Every group has its dominant and weights that sum to 1."""
        wrong = "the lists of a layer do not fit together: " + self.name
        lengths = {len(self.labels), len(self.weights), len(self.similarity), self.num_experts}
        if len(lengths) > 1 or len(self.dominants) != self.num_groups:
            raise ValueError(wrong)
        if list(self.dominants) != sorted({e for e in self.dominants if 0 <= e < len(self.labels)}):
            raise ValueError(wrong)
        if [self.labels[e] for e in self.dominants] != list(range(self.num_groups)):
            raise ValueError(wrong)
        total: Counter[int] = Counter()
        for group, weight in zip(self.labels, self.weights, strict=True):
            total[group] += weight  # type: ignore[assignment]
        total.pop(-1, None)
        if set(total) != set(range(self.num_groups)):
            raise ValueError(wrong)
        if any(abs(weight - 1) > 1e-6 for weight in total.values()):
            raise ValueError(f"the weights of a group do not sum to 1: {self.name}")
        return self


def is_changed(layer: LayerPlan) -> bool:
    """Whether a layer becomes another function, rather than staying as it is."""
    return layer.operator != "keep" or layer.factors is not None or layer.hidden_units is not None


class Predicted(_Strict):
    """What the plan makes of the whole checkpoint. Bytes are those of tensors on disk."""

    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int  # at most
    bytes_after_least: int | None = None  # while ranks or rows are not decided; None: exact
    moe_flops_per_token_before: int  # 2 per weight used: the chosen experts and the router
    moe_flops_per_token_after: int  # choices of one group run once, at the rate of the sample


class Plan(_Strict):
    """A whole compression, decided. A deterministic function of facts, statistics and recipe."""

    version: Literal[1] = 1
    checkpoint: str  # hashes: of the source, of the statistics, of the calibration text
    statistics: str
    text: str
    form: Literal["stock", "mapped", "expanded"]
    method: Method  # the coordinates, resolved
    predicted: Predicted
    recipe: CompressRecipe
    layers: tuple[LayerPlan, ...]

    def layer(self, name: str) -> LayerPlan:
        """The plan of the layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def to_json(self) -> str:
        """The plan as a file holds it: a line per field, a line per list of plain values."""
        return _readable(self.model_dump(mode="json")) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan; a reader never sees half of it."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(self.to_json(), encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """The plan of a file, or a PlanError that says what is wrong with it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            version = json.loads(text).get("version")
        except FileNotFoundError:
            raise PlanError(f"{path}: there is no such plan. Make one with `smelt plan`.") from None
        except (OSError, ValueError, AttributeError) as error:
            raise PlanError(f"{path}: cannot be read as a plan ({error}).") from None
        if version != VERSION:
            raise PlanError(
                f"{path}: a plan of version {version!r}, and this smelt reads {VERSION}. "
                "Make it again with `smelt plan`."
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise PlanError(
                f"{path}: {where}: {first['msg']}. The plan was edited or truncated: "
                "mend it, or make it again with `smelt plan`."
            ) from None


def _readable(value: Any, indent: int = 0) -> str:
    """JSON with one line per field, and a list of plain values on one line."""
    pad, end = "  " * (indent + 1), "  " * indent
    if isinstance(value, Mapping) and value:
        rows = [f"{json.dumps(k)}: {_readable(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(pad + row for row in rows) + f"\n{end}}}"
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return "[\n" + ",\n".join(pad + _readable(v, indent + 1) for v in value) + f"\n{end}]"
    return json.dumps(value, ensure_ascii=False)
