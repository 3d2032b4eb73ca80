"""The recipe of a training run."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from smelt.recipe import Settings
from smelt.text.sources import TextSource, as_source

Sources = Annotated[
    tuple[Annotated[TextSource, BeforeValidator(as_source)], ...], Field(min_length=1)
]
Share = Annotated[float, Field(ge=0, lt=1)]


class ModelSettings(Settings):
    """SaMoE or a stock family, and any fields of its configuration."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    model_type: str  # "samoe", or a family of transformers
    preset: Literal["paper", "modern"] | None = None  # samoe only: the fields it starts from

    @model_validator(mode="after")
    def _preset_of_samoe(self) -> "ModelSettings":
        if self.preset is not None and self.model_type != "samoe":
            raise ValueError("preset belongs to model_type samoe; leave it out")
        return self

    def fields(self) -> dict[str, Any]:
        """The configuration fields, without the family's name and the preset's."""
        return dict(self.model_extra or {})


class TokenizerSettings(Settings):
    """A tokenizer fitted to the training text, or the folder of one that exists."""

    vocab_size: PositiveInt | None = None
    folder: str | None = None
    sentinels: Annotated[int, Field(ge=0)] = 0  # for span corruption, when one is fitted

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizerSettings":
        if (self.vocab_size is None) == (self.folder is None):
            raise ValueError("give either vocab_size (fit one to the text) or folder (take one)")
        return self


class TextSettings(Settings):
    """What is trained on and what is held out; every source a word or a mapping, with a weight."""

    train: Sources
    held_out: Sources
    tokens: PositiveInt  # drawn from the train sources; more steps than they fill repeat them
    held_out_tokens: PositiveInt = 65536  # of each held-out source
    sequence_length: PositiveInt = 256
    seed: Annotated[int, Field(ge=0)] = 0  # which text is drawn, whatever the seed of the run
    cache: str | None = (
        None  # folder of tokenised text; None: $SMELT_CACHE or ~/.cache/smelt/tokens
    )


class SpanSettings(Settings):
    """Span corruption, for encoder–decoder families."""

    density: Annotated[float, Field(gt=0, lt=1)] = 0.15
    mean_span: Annotated[float, Field(ge=1)] = 3.0


class TrainRecipe(Settings):
    """One training run: everything that decides its result."""

    model: ModelSettings
    tokenizer: TokenizerSettings
    text: TextSettings
    output: str  # the folder to make
    objective: Literal["causal", "masked"] = "causal"  # masked: samoe only
    masked: Annotated[float, Field(gt=0, lt=1)] = 0.15  # share of tokens a masked model predicts
    steps: PositiveInt
    batch_size: PositiveInt = 16  # sequences of a step, over all micro-batches and processes
    accumulate: PositiveInt = 1  # micro-batches a step; changes memory, not the result
    learning_rate: PositiveFloat = 2e-3
    final_learning_rate: Share = 0.1  # at the last step, as a share of the highest
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.1  # of matrices; not alpha, beta, norms, biases
    adam_beta2: Share = 0.95
    max_gradient_norm: PositiveFloat = 1.0
    router_aux_loss: Annotated[float, Field(ge=0)] = 0.01  # load balance, each layer for itself
    router_z_loss: Annotated[float, Field(ge=0)] = 0.0
    balance: Literal["sum", "mean"] | None = None  # over layers; None: samoe sum, others mean
    spans: SpanSettings = SpanSettings()
    seed: Annotated[int, Field(ge=0)] = 0  # of the weights and the order of the batches
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """One run each, after one another, in OUTPUT/seed-S; `seed` then has no meaning."""
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast, float32 weights
    gradient_checkpointing: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the saved weights
    log_every: PositiveInt = 20  # steps
    details_every: PositiveInt = 10  # lines of the log from one with every layer's routing on
    profile_every: PositiveInt | None = None  # steps from one that is timed by phase
    peak_flops: PositiveFloat | Literal["measure"] | None = None  # per second; for the MFU
    tensorboard: bool = False  # write the log for it too
    evaluate_every: PositiveInt = 500  # steps; the end is always evaluated
    checkpoint_every: PositiveInt | None = None  # steps; None: a tenth of them
    keep_checkpoints: PositiveInt = 3  # the last so many keep their weights and held-out loss

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if seeds is not None and len(set(seeds)) < len(seeds):
            raise ValueError("every seed is named once")
        return seeds

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainRecipe":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into {self.accumulate} equal "
                "micro-batches; make batch_size a multiple of accumulate"
            )
        if self.objective == "masked" and self.model.model_type != "samoe":
            raise ValueError("objective masked is for model_type samoe; stock families are causal")
        return self

    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps after which the run can be resumed: the last one is always among them."""
        every = self.checkpoint_every or max(self.steps // 10, 1)
        return (*range(every, self.steps, every), self.steps)
