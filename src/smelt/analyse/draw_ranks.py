"""The figure of stable ranks: by layer, before and after."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from smelt.analyse.figures import STYLE, legend, looks, panels, whole_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stable_ranks(kinds: Mapping[str, Mapping[str, Mapping[str, list[float]]]]) -> "Figure":
    """A panel per matrix: the mean over a layer's experts, with a band from least to most.

    Args:
        kinds: by what the line is called, then by layer, then by matrix.
    """
    import matplotlib

    first = next(iter(next(iter(kinds.values())).values()))
    look = looks(list(kinds))
    with (
        matplotlib.rc_context(STYLE),
        panels(len(first), most=3, width=3.4, height=2.8) as (figure, axes),
    ):
        for panel, matrix in zip(axes, first, strict=True):
            for kind, layers in kinds.items():
                values = [matrices[matrix] for matrices in layers.values()]
                panel.plot(
                    range(len(values)),
                    [sum(one) / len(one) for one in values],
                    color=look[kind].colour,
                    linestyle=look[kind].line,
                    marker=look[kind].marker,
                    label=kind,
                )
                panel.fill_between(
                    range(len(values)),
                    [min(one) for one in values],
                    [max(one) for one in values],
                    color=look[kind].colour,
                    alpha=0.16,
                    linewidth=0,
                )
            panel.set(title=matrix, xlabel="MoE layer", ylabel="stable rank", ylim=(0, None))
            whole_ticks(panel.xaxis)
        legend(figure, axes, kinds)
    return figure
