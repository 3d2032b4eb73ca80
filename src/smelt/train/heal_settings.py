"""The recipe of a healing run: a compressed checkpoint, its original, and how it is trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from smelt.settings import Settings
from smelt.text.sources import TextSource
from smelt.train.settings import (
    Share,
    Sources,
    SpanSettings,
    TaskSettings,
    TextSettings,
    TrainRecipe,
)
from smelt.train.sparsify import is_too_short

Count = Annotated[int, Field(ge=0)]
Scale = Annotated[float, Field(ge=0)]
RATES = {"all": 2e-4, "experts": 2e-4, "routers": 5e-5, "lora": 5e-4}
"""Learning rates where none is given, by what is trained."""


class HealText(TextSettings):
    """What is healed on and what is held out; by default the running Python's own library."""

    train: Sources = (TextSource("python"),)
    held_out: Sources = (TextSource("python", split="held-out"),)
    tokens: PositiveInt = 1 << 20
    held_out_tokens: PositiveInt = 32768


class DistillSettings(Settings):
    """The loss: cross_entropy · CE + weight · KL(teacher ‖ student) at a temperature."""

    preset: Literal["faithful"] | None = None  # METHODS §7: the sums of the paper's code
    temperature: PositiveFloat = 2.0
    weight: Scale = 0.2  # λ·T²; 0: the teacher is only measured against
    cross_entropy: Scale = 1.0

    @property
    def is_faithful(self) -> bool:
        """KL summed over all positions, padding too, divided by the batch; no dropout."""
        return self.preset == "faithful"


class CacheSettings(Settings):
    """The teacher's predictions, computed once and kept on disk."""

    top_k: PositiveInt = 64  # tokens kept of each prediction; the rest is one bucket
    values: Literal["float16", "bfloat16", "float32"] = "float16"
    folder: str | None = None  # None: one for each teacher and text, where tokenised text is kept
    batch_size: PositiveInt = 8  # sequences of a forward of the teacher


class LoraSettings(Settings):
    """Low-rank updates of attention and experts, merged into the weights at the end."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0


class DecomposeSettings(Settings):
    """W ≈ U V + S for every matrix of the merged experts; rows of S go while the model heals."""

    rank: PositiveInt = 32
    keep: Annotated[float, Field(gt=0, le=1)] = 0.10  # share of the entries of S at the end
    initial: Share = 0.04  # share of the steps before the first row goes
    final: Share = 0.16  # share of the steps after the last one went
    decay: Share = 0.85  # of the running mean of importances
    excluded: tuple[int | str, ...] = ()  # layers left whole: names, or positions from 0


class HealRecipe(Settings):
    """One healing run: everything that decides its result."""

    student: str  # a compressed checkpoint: stock, mapped or factored
    teacher: str  # the original
    output: str  # the folder to make
    text: HealText | None = None  # where there is no task: the defaults of HealText
    task: TaskSettings | None = None  # encoder–decoder families: its examples instead of text
    spans: SpanSettings = SpanSettings()  # encoder–decoder families
    distill: DistillSettings = DistillSettings()
    cache: CacheSettings | None = None  # None: the teacher is in memory beside the student
    train: Literal["all", "experts", "routers", "lora"] = "all"
    train_routers: bool = False  # with all, experts or lora: the routers too
    lora: LoraSettings = LoraSettings()
    decompose: DecomposeSettings | None = None
    steps: PositiveInt = 300
    batch_size: PositiveInt = 16
    accumulate: PositiveInt = 1
    learning_rate: Scale | None = None  # None: by what is trained; 0: decompose only
    embedding_rate: PositiveFloat = 1.0  # learning rate of embeddings over that of all else
    final_learning_rate: Share = 0.1
    warmup_steps: Count = 10
    weight_decay: Scale = 0.0
    adam_beta2: Share = 0.95
    max_gradient_norm: PositiveFloat = 1.0
    router_aux_loss: Scale = 0.0
    seed: Count = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] | None = None  # saved; None: the student's
    log_every: PositiveInt = 20
    evaluate_every: PositiveInt = 100
    checkpoint_every: PositiveInt | None = None  # steps; None: a tenth of them
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _some_text(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("task") and values.get("text") is None:
            return {**values, "text": HealText()}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> "HealRecipe":
        if self.text is not None and self.task is not None:
            raise ValueError("give either text or task: what is healed on")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into {self.accumulate} equal "
                "micro-batches; make batch_size a multiple of accumulate"
            )
        if self.distill.is_faithful and self.cache is not None:
            raise ValueError(
                "preset faithful compares padding too, of which nothing is kept; leave cache out"
            )
        if self.spans.redraw and self.cache is not None:
            raise ValueError(
                "spans.redraw draws other spans in each epoch, of which nothing is kept; leave "
                "redraw or cache out"
            )
        if self.distill.weight == 0 and self.distill.cross_entropy == 0:
            raise ValueError(
                "distill.weight and distill.cross_entropy are both 0: nothing to learn"
            )
        if self.decompose is None:
            if self.learning_rate == 0:
                raise ValueError(
                    "learning_rate 0 trains nothing; with decompose it prunes by gradients alone"
                )
            return self
        if self.train not in ("all", "experts"):
            raise ValueError(f"decompose trains the experts; train is {self.train!r}: leave it out")
        if is_too_short(self.steps, self.decompose.initial, self.decompose.final):
            raise ValueError(
                f"{self.steps} steps with decompose.initial {self.decompose.initial} and "
                f"decompose.final {self.decompose.final} leave no step for rows of S to go "
                "(T ≤ T_i + T_f); give more steps or smaller shares"
            )
        return self

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return RATES[self.train] if self.learning_rate is None else self.learning_rate

    def loop(self) -> TrainRecipe:
        """What the trainer goes by: the same run as one of `smelt train`."""
        names = set(TrainRecipe.model_fields) & set(HealRecipe.model_fields)
        own: dict[str, Any] = {name: getattr(self, name) for name in names}
        own |= {
            "start": self.student,
            "text": None if self.text is None else TextSettings(**dict(self.text)),
            "learning_rate": self.rate or 1.0,  # which 0 is not for `smelt train`
            "dtype": self.dtype or "float32",
        }
        return TrainRecipe(**own).model_copy(update={"learning_rate": self.rate})
