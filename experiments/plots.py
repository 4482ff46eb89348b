"""One look for all figures: colours that colour-blind readers can tell apart, bands, panels."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.files import replacing
from experiments.statistics import bootstrap_mean

# Okabe and Ito's palette without its yellow, which is too light for lines.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")


def panels(
    count: int, *, width: float = 4.6, height: float = 3.8, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, `columns` or all of them in a row; sizes in inches."""
    columns = min(columns or count, count)
    num_rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * num_rows), layout="constrained")
    axes = list(np.ravel(figure.subplots(num_rows, columns)))
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, whole or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a line style for each name, the same for the same list.

    Up to eight names differ in all but the line, which is solid; then the colours come again with
    another line and another marker. Up to 32 names no two share two of the three.
    """
    count = len(COLORS)
    return {
        name: {
            "color": COLORS[i % count],
            "marker": MARKERS[(i + i // count) % count],
            "linestyle": LINES[i // count % len(LINES)],
        }
        for i, name in enumerate(names)
    }


def legend(figure: Figure, axis: Axes) -> None:
    """The names of `axis` beside the panels, where they cover no curve."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def band(
    axis: Axes,
    curves: Mapping[float, Sequence[float]],
    label: str,
    style: Mapping[str, Any],
    *,
    scale: float = 1.0,
) -> None:
    """A curve of means with its 95 % bootstrap band; `curves` maps x to the values of all seeds."""
    xs = sorted(curves)
    means, lows, highs = np.array([bootstrap_mean(curves[x]) for x in xs]).T * scale
    axis.plot(xs, means, label=label, markevery=max(1, len(xs) // 8), markersize=5, **style)
    axis.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
