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

from smelt.settings import Settings
from smelt.text.sources import TextSource, as_source
from smelt.text2text.tasks import TASKS

Sources = Annotated[
    tuple[Annotated[TextSource, BeforeValidator(as_source)], ...], Field(min_length=1)
]
Share = Annotated[float, Field(ge=0, lt=1)]


class ModelSettings(Settings):
    """SaMoE or a stock family, and any fields of its configuration."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    model_type: str | None = None  # "samoe", or a family of transformers; None: that of `start`
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
    redraw: bool = False  # other spans in each epoch
    recurring: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the sequences whose spans recur in them, which teaches to copy from the context."""
    cloze: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the sequences with questions about themselves, which teaches to find and copy."""

    @model_validator(mode="after")
    def _shares_of_one(self) -> "SpanSettings":
        if self.recurring + self.cloze > 1:
            raise ValueError(
                f"recurring {self.recurring} and cloze {self.cloze} are shares of the same "
                "sequences; make them 1 together at most"
            )
        return self


class InventedSettings(Settings):
    """Questions made from text (`smelt.text2text.invent`)."""

    questions: PositiveInt  # at most
    paragraphs_of: tuple[str, ...] = ()  # benchmarks whose training contexts are asked about
    text: tuple[Annotated[TextSource, BeforeValidator(as_source)], ...] = ()  # and other text

    @model_validator(mode="after")
    def _has_text(self) -> "InventedSettings":
        unknown = [name for name in self.paragraphs_of if name not in TASKS]
        if unknown:
            raise ValueError(
                f"paragraphs_of: there is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}"
            )
        if not self.paragraphs_of and not self.text:
            raise ValueError("give paragraphs_of (benchmarks) or text: what is asked about")
        return self


class TaskSettings(Settings):
    """A benchmark to fine-tune on, as text to text; docs/tasks.md has the protocol."""

    name: str  # one of smelt.text2text.TASKS
    limit: PositiveInt | None = None  # training examples, drawn by `seed`; None: all
    max_input: Annotated[int, Field(ge=16)] | None = None  # tokens; None: the task's own
    max_target: Annotated[int, Field(ge=2)] | None = None
    group_by_length: bool = True  # batches of examples about equally long: less padding
    balanced: bool = False  # repeat the examples of rare answers until all are as frequent
    held_out: PositiveInt = 256  # examples whose loss is measured on the way, never reported ones
    seed: Annotated[int, Field(ge=0)] = 0  # which examples are drawn, whatever the run's seed
    invented: InventedSettings | None = None  # trained on these instead of its own questions

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in TASKS:
            raise ValueError(f"there is no such task; the tasks are {', '.join(TASKS)}")
        return name

    @model_validator(mode="after")
    def _answers_are_generated(self) -> "TaskSettings":
        if self.invented is not None and TASKS[self.name].kind != "answer":
            fit = ", ".join(name for name, task in TASKS.items() if task.kind == "answer")
            raise ValueError(f"invented questions are for the tasks {fit}; leave them out")
        return self

    @property
    def input_length(self) -> int:
        """The tokens an input may have."""
        return self.max_input or TASKS[self.name].max_input

    @property
    def target_length(self) -> int:
        """The tokens a target may have."""
        return self.max_target or TASKS[self.name].max_target


class TrainRecipe(Settings):
    """One training run: everything that decides its result.

    Either fresh weights (`model`, `tokenizer`) or those of a checkpoint (`start`); either `text` or
    a `task`.
    """

    start: str | None = None  # a checkpoint folder: its weights, configuration and tokenizer
    model: ModelSettings = ModelSettings()  # with start: fields of its configuration to change
    tokenizer: TokenizerSettings
    text: TextSettings | None = None
    task: TaskSettings | None = None
    output: str  # the folder to make
    objective: Literal["causal", "masked"] = "causal"  # masked: samoe only
    masked: Annotated[float, Field(gt=0, lt=1)] = 0.15  # share of tokens a masked model predicts
    steps: PositiveInt
    batch_size: PositiveInt = 16  # sequences of a step, over all micro-batches and processes
    accumulate: PositiveInt = 1  # micro-batches a step; changes memory, not the result
    learning_rate: PositiveFloat = 2e-3
    embedding_rate: PositiveFloat = 1.0  # learning rate of embeddings over that of all else
    final_learning_rate: Share = 0.1  # at the last step, as a share of the highest
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.1  # of matrices; not alpha, beta, norms, biases
    adam_beta2: Share = 0.95
    max_gradient_norm: PositiveFloat = 1.0
    router_aux_loss: Annotated[float, Field(ge=0)] = 0.01  # load balance, each layer for itself
    router_z_loss: Annotated[float, Field(ge=0)] = 0.0
    balance: Literal["sum", "mean"] | None = None  # over layers; None: samoe sum, others mean
    spans: SpanSettings = SpanSettings()
    attention: Literal["drawn", "matching"] = "drawn"  # at the start; matching: switch only
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

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_start(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("start") and not values.get("tokenizer"):
            return {**values, "tokenizer": {"folder": values["start"]}}
        return values

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
        self._check_origin()
        if self.objective == "masked" and self.model.model_type != "samoe":
            raise ValueError("objective masked is for model_type samoe; stock families are causal")
        return self

    def _check_origin(self) -> None:
        if self.start is None and self.model.model_type is None:
            raise ValueError("give model.model_type (fresh weights) or start (a checkpoint folder)")
        if self.attention == "matching" and self.model.model_type != "switch_transformers":
            raise ValueError(
                "attention matching is for fresh weights of model_type switch_transformers; leave "
                "it out"
            )
        if self.start is not None and self.model.model_type is not None:
            raise ValueError("start has a family of its own; leave model.model_type out")
        if self.start is not None and self.tokenizer.folder != self.start:
            raise ValueError("start has a tokenizer of its own; leave tokenizer out")
        if (self.text is None) == (self.task is None):
            raise ValueError("give either text or task: what is trained on")
        if self.task is not None and self.start is None:
            raise ValueError(
                f"task {self.task.name} fine-tunes a checkpoint; name it as start, or give text"
            )

    @property
    def sequence_length(self) -> int:
        """The tokens of a sequence, of a task at most: what speed and tokens are counted by."""
        if self.task is not None:
            return self.task.input_length
        assert self.text is not None
        return self.text.sequence_length

    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps after which the run can be resumed: the last one is always among them."""
        every = self.checkpoint_every or max(self.steps // 10, 1)
        return (*range(every, self.steps, every), self.steps)
