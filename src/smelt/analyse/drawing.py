"""The figures, in the order of the page: name, title, the sentence under it, and what draws it.

Everything is drawn from the numbers of `analysis.json` and nothing else.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smelt.analyse.draw_curves import balance, loss, phases
from smelt.analyse.draw_gradients import by_block, contributions, over_experts, per_expert
from smelt.analyse.draw_layers import (
    alphas,
    cka,
    history,
    load,
    mixing,
    mutual_information,
    output_cosine,
)
from smelt.analyse.figures import STYLE, Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Value], "Figure | None"]

TABLE: tuple[tuple[str, str, str, Draw], ...] = (
    (
        "loss",
        "Loss",
        (
            "Training and held-out loss against the tokens trained on: the lower line learnt "
            "more from the same text. Bands are ± one standard deviation over seeds."
        ),
        loss,
    ),
    (
        "balance",
        "Load and stability of training",
        (
            "Whether routers stay balanced (balance near the number of MoE layers, entropy near "
            "1), how many choices exceed capacity, and how large gradients are before clipping."
        ),
        balance,
    ),
    (
        "step-time",
        "Where the time of a step goes",
        ("Milliseconds of one training step by phase; the number at the end is the whole step."),
        phases,
    ),
    (
        "gradient-by-block",
        "Gradient norm and signal-to-noise by block",
        (
            "How strong the gradient of one micro-batch is, and how large the part that all "
            "micro-batches agree on is beside the rest, by depth and kind of parameters; of "
            "shared experts, what each layer sends to them."
        ),
        by_block,
    ),
    (
        "gradient-per-expert",
        "Signal-to-noise of every expert against its tokens",
        (
            "A point is one expert: further right it learnt from more tokens, further up its "
            "micro-batches agree more. Sharing moves stored experts to the right."
        ),
        per_expert,
    ),
    (
        "gradient-over-experts",
        "Gradient of a stored expert against the number of experts",
        (
            "With more experts each one sees fewer tokens: the line that falls less keeps more "
            "of its signal."
        ),
        over_experts,
    ),
    (
        "contributions",
        "Do layers pull shared experts the same way?",
        (
            "Cosine between the mean gradients that two layers send to the experts they share: "
            "blue, they want opposite changes; red, the same; white, unrelated ones. Alignment "
            "is 1 of unrelated contributions, the number of layers where all are equal, and "
            "below 1 where they cancel."
        ),
        contributions,
    ),
    (
        "alpha",
        "What each layer takes from the pool (α)",
        (
            "Learnt α of every MoE layer (rows) for every pool entry (columns): a row with one "
            "strong cell is nearly one-hot, an even row blends, and rows that are multiples of "
            "each other use one direction of the pool."
        ),
        alphas,
    ),
    (
        "mixing",
        "How hard the sharing is (α), and the scale of the stream (β)",
        (
            "Distance of each layer's α from one-hot (0: one entry only; dashed: an even "
            "blend), the effective rank of all layers' α, and β of each layer (1: an ordinary "
            "residual stream)."
        ),
        mixing,
    ),
    (
        "alpha-history",
        "How |α| came about",
        (
            "|α| of every layer and entry during training: flat lines kept the combination that "
            "they were initialised with."
        ),
        history,
    ),
    (
        "cka",
        "Similarity of hidden states",
        (
            "Linear CKA between the hidden states after every block: bright squares along the "
            "diagonal are stretches of depth that change little."
        ),
        cka,
    ),
    (
        "output-cosine",
        "Similarity of MoE layers as functions",
        (
            "Mean cosine between what two MoE layers, each with its own router, make of the "
            "same inputs: near 1 they do the same, near 0 they are unrelated."
        ),
        output_cosine,
    ),
    (
        "routing",
        "Agreement of routings",
        (
            "Normalised mutual information of the experts that two layers choose for a token: "
            "1, one choice follows from the other; 0, they are independent."
        ),
        mutual_information,
    ),
    (
        "load",
        "Tokens per expert",
        (
            "Choices of every expert in units of an even load, experts sorted within each "
            "layer: a dark right end means experts that hardly learn."
        ),
        load,
    ),
)
"""In the order of the page."""


@dataclass(frozen=True)
class Drawn:
    """One figure, ready for a page."""

    name: str
    title: str
    sentence: str  # what it says
    svg: str


def draw(value: Value) -> list[Drawn]:
    """Every figure that the numbers suffice for."""
    import matplotlib

    found = []
    with matplotlib.rc_context(STYLE):
        for name, title, sentence, make in TABLE:
            figure = make(value)
            if figure is not None:
                found.append(Drawn(name, title, sentence, _svg(figure, name)))
    return found


def _svg(figure: "Figure", name: str) -> str:
    """The figure as an SVG element; the same figure is the same text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": name})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
