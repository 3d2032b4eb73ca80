"""What the process of one job is told: every recipe that it carries out, and where things lie."""

from typing import Literal

from smelt.recipe import CalibrationRecipe, CompressRecipe
from smelt.settings import Settings
from smelt.text2text.files import Part
from smelt.train.heal_settings import HealRecipe
from smelt.train.settings import TrainRecipe

Kind = Literal["start", "full", "trial", "variant"]


class Ask(Settings):
    """What a model is measured on."""

    part: Part
    benchmark: str | None = None
    max_input: int | None = None  # tokens; None: the benchmark's own
    limit: int | None = None  # items, at most
    batch_size: int = 32
    text: tuple[str, ...] = ()  # perplexity of each source
    num_tokens: int = 65_536
    sequence_length: int = 256
    tasks: tuple[str, ...] = ()  # zero-shot


class Work(Settings):
    """One job.

    `train` makes the folder that it names; `compress` the folder `compress.output`, and `heal` then
    `heal.output`. What was measured goes to `result`.
    """

    kind: Kind
    result: str  # JSON
    model: str  # the folder that is measured
    full: str = ""  # the folder of the full model, of a variant or trial
    source: str = ""  # the folder it is made from, whose weights have to be there
    train: TrainRecipe | None = None
    calibration: CalibrationRecipe | None = None  # of the full model
    stats: str = ""  # the folder of its statistics: made or read
    compress: CompressRecipe | None = None
    heal: HealRecipe | None = None
    ask: Ask | None = None
