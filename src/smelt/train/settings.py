"""The recipe of a training run."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from smelt.recipe import Settings
from smelt.text.sources import TextSource, as_source

Sources = Annotated[
    tuple[Annotated[TextSource, BeforeValidator(as_source)], ...], Field(min_length=1)
]
Share = Annotated[float, Field(ge=0, lt=1)]


class ModelSettings(Settings):
    """A stock family and any fields of its transformers configuration."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    model_type: str

    def fields(self) -> dict[str, Any]:
        """The configuration fields, without the family's name."""
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
    steps: PositiveInt
    batch_size: PositiveInt = 16  # sequences
    learning_rate: PositiveFloat = 2e-3
    final_learning_rate: Share = 0.1  # at the last step, as a share of the highest
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    adam_beta2: Share = 0.95
    max_gradient_norm: PositiveFloat = 1.0
    router_aux_loss: Annotated[float, Field(ge=0)] = 0.01  # load balance, each layer for itself
    spans: SpanSettings = SpanSettings()
    seed: int = 0
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the saved weights
    log_every: PositiveInt = 20  # steps
    evaluate_every: PositiveInt = 500  # steps; the end is always evaluated
