"""What can be asked of calibration and compression."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from smelt.settings import Settings


class CalibrationTask(Settings):
    """Training examples of a benchmark (docs/tasks.md) to calibrate on: encoder–decoders only."""

    name: str
    limit: int | None = Field(default=1024, ge=1)  # examples, drawn by the seed; None: all
    max_input: int | None = Field(default=None, ge=16)  # tokens; None: the task's own
    max_target: int | None = Field(default=None, ge=2)


class CalibrationRecipe(Settings):
    """Which text the routing statistics are taken from, and how much of it."""

    text: tuple[str, ...] = ("python",)
    task: CalibrationTask | None = None  # its examples instead of text: inputs read, targets said
    num_tokens: int = Field(default=65_536, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    batch_size: int = Field(default=8, ge=1)
    seed: int = 0
    chat_template: bool = False
    sample_tokens: int = Field(default=4_096, ge=1)  # inputs kept for refits and layer errors
    input_gram: bool = False  # the dearest statistic in one pass: D×D per layer
    gradients: bool = False  # a backward pass, with the whole model in memory


class DecomposeRecipe(Settings):
    """Every expert of the compressed layers as low rank and a few whole rows: W ≈ U V + S.

    Ranks: fixed (`rank`, 32 where nothing is said), the least that keep a share of the spectrum
    (`energy`), or what fits into a share of the merged experts' bytes (`size`).
    """

    rank: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)  # of Σσ², for each matrix of a layer
    size: float | None = Field(default=None, gt=0, lt=1)  # of the bytes, rows of S among them
    across: Literal["model", "layer"] = "model"  # one budget for all layers, or one for each
    keep: float = Field(default=0.1, ge=0, le=1)  # share of the entries of S
    svd: Literal["data-aware", "plain"] = "data-aware"
    rows: Literal["output", "norm"] = "output"  # which rows stay: by their output, their entries
    threshold: Literal["model", "layer"] = "model"  # one for all rows of S, or one for each layer
    ridge: float = Field(default=1e-2, gt=0)  # of the Grams, by their mean diagonal

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = [n for n in ("rank", "energy", "size") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"set one of rank, energy and size, not {' and '.join(given)}")
        return self

    @property
    def fixed_rank(self) -> int | None:
        """The rank of every matrix, where neither energy nor a budget chooses it."""
        if self.energy is not None or self.size is not None:
            return None
        return self.rank or 32


class ReconstructRecipe(Settings):
    """What is kept of each layer, fitted to what the whole layer did on calibration tokens.

    By gradient steps and, before them or instead, the down projections in closed form; a share of
    the tokens is held out and decides what is kept, so that no layer ends worse than it began. The
    defaults are what did best on the embedded checkpoint (LAB.md, 2026-11-28).
    """

    # None: corrected, and sequential in blocks that do not add their experts' output as it is; of
    # the inputs that statistics keep: layer.
    target: Literal["layer", "sequential", "corrected"] | None = None
    experts: bool = True
    router: bool = True
    biases: bool = True  # of both
    inputs: Literal["walk", "sample"] = "walk"  # sample: the inputs that the statistics keep
    tokens: int | None = Field(default=None, ge=64)  # None: all that are calibrated on
    held_out: float = Field(default=0.1, gt=0, lt=1)
    closed_form: bool = False  # before the steps; alone with steps: 0
    ridge: float = Field(default=1e-2, gt=0)  # of the closed form, by the Grams' mean diagonal
    steps: int = Field(default=400, ge=0)
    seconds: float | None = Field(default=None, gt=0)  # of gradient steps, per layer at most
    batch_tokens: int = Field(default=1024, ge=1)
    rate: float = Field(default=0.03, gt=0)  # Adam's step, as a share of a parameter's size
    evaluations: int = Field(default=20, ge=1)  # of the held-out tokens, on the way
    anchor: float = Field(default=0.0, ge=0)  # weight of the squared relative distance to the start
    weight: Literal["none", "saliency", "relative"] = "none"  # of each token's squared error
    states: Literal["model", "float32", "bfloat16"] = "model"  # type of the tokens that are kept

    @model_validator(mode="after")
    def _something_is_fitted(self) -> Self:
        if not (self.experts or self.router):
            raise ValueError("set experts or router, or both: nothing else can be fitted")
        return self


class AutoRecipe(Settings):
    """How `method: auto` chooses a method for each layer: by the error after a short fit."""

    candidates: tuple[str, ...] = ()  # methods by name; (): those of the form
    steps: int = Field(default=40, ge=0)  # gradient steps that each candidate gets
    protect: int = Field(default=2, ge=0)  # lost experts that are tried as protected ones

    @field_validator("candidates")
    @classmethod
    def _no_auto(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "auto" in value:
            raise ValueError("auto chooses among methods, and is none itself")
        return value


AUTO_CANDIDATES = {
    "stock": ("reap", "ean", "m-smoe-saliency", "hc-smoe", "ream"),
    "mapped": ("reap-redirect", "m-smoe-saliency", "reap", "hc-smoe", "ream"),
}
"""What `auto` tries."""

DEFAULT_METHODS = {"stock": "reap", "mapped": "m-smoe-saliency", "expanded": "m-smoe-saliency"}
"""What won the study (LAB.md, 2026-11-22); only the stock form can drop experts."""


class CompressRecipe(Settings):
    """A compression: a method by name, the coordinates that differ from it, and a budget.

    A method left out is the one that won the study in the form; a coordinate left out (None) is the
    method's own.
    """

    source: str
    output: str
    form: Literal["stock", "mapped", "expanded"] = "stock"
    method: str
    score: str | None = None
    similarity: str | None = None
    budget: Literal["uniform", "global", "measured"] | None = None
    grouping: str | None = None  # nearest, centroids, hierarchical, k-means
    align: Literal["weights", "activations", "both", "none"] | None = None
    reference: Literal["dominant", "first", "others"] | None = None
    weights: str | None = None
    rule: str | None = None  # sum, fisher, regmean, zipit, least-squares, subspace
    repair: bool | None = None
    router: str | None = None
    experts: int | None = Field(default=None, ge=1)  # kept per layer, on average
    keep: float | None = Field(default=None, gt=0, le=1)  # or the share of them
    size: float | None = Field(default=None, gt=0, le=1)  # or of their bytes (stock form)
    excluded: tuple[int | str, ...] = ()  # layers left as they are: names, or positions from 0
    protect: dict[str, tuple[int, ...]] | tuple[int, ...] = ()  # ids by layer, or in every layer
    min_per_layer: int = Field(default=2, ge=1)
    strict: bool = False
    sequential: bool | None = None
    decompose: DecomposeRecipe | None = None  # the mapped form only
    hidden_units: int | None = Field(default=None, ge=1)  # F kept in every expert; stock form only
    # true: with its defaults, and so does `smelt compress` where it is left out; false: no fit.
    reconstruct: ReconstructRecipe | None = None
    auto: AutoRecipe = AutoRecipe()  # read where method is auto
    calibration: CalibrationRecipe = CalibrationRecipe()
    seed: int = 0
    device: str = "cpu"
    workers: int | None = Field(
        default=None, ge=1
    )  # alignment solves at a time; None: one per core
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _what_is_left_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        has = {name for name, value in values.items() if value is not None}
        if not has & {"experts", "keep", "size"} and has & {"decompose", "hidden_units"}:
            values = {**values, "keep": 1.0}  # those make experts smaller, not fewer
        if values.get("method") is not None:
            return values
        return {**values, "method": DEFAULT_METHODS.get(values.get("form", "stock"), "reap")}

    @property
    def candidates(self) -> tuple[str, ...]:
        """The methods that are tried in each layer: one, unless the method is auto."""
        if self.method != "auto":
            return (self.method,)
        return self.auto.candidates or AUTO_CANDIDATES.get(self.form, AUTO_CANDIDATES["mapped"])

    @field_validator("reconstruct", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        """`true` is the usual fit, `false` none."""
        return ({} if value else None) if isinstance(value, bool) else value

    @field_validator("protect", mode="before")
    @classmethod
    def _layers_as_strings(cls, value: object) -> object:
        """A position is a string in JSON, and should be the same value when read back."""
        return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.size is not None:  # a plan says beside it what was chosen
            if self.keep is not None or (self.experts is None and self.hidden_units is not None):
                raise ValueError("size chooses experts and hidden_units: leave both and keep out")
        elif (self.experts is None) == (self.keep is None):
            raise ValueError(
                "set one of experts (a count), keep (a share) and size (a share of their bytes)"
            )
        return self


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a compression by plain names, those of its calibration put in their group.

    `seed`, which both have, goes to both.
    """
    own = dict(settings)
    group = dict(own.pop("calibration", None) or {})
    for name in CalibrationRecipe.model_fields:
        if name in own:
            group[name] = own[name] if name in CompressRecipe.model_fields else own.pop(name)
    return own | ({"calibration": group} if group else {})
