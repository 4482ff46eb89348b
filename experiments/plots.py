"""One look for all figures: colours that colour-blind readers can tell apart, bands, panels."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.files import replacing
from experiments.statistics import bootstrap_mean

# Okabe and Ito's palette without its yellow, which is too light for lines.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def panels(count: int, *, width: float = 4.6, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels side by side; sizes in inches."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(np.ravel(figure.subplots(1, count)))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, whole or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour and a marker for each name, the same for the same list."""
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }


def band(
    axis: Axes,
    curves: Mapping[float, Sequence[float]],
    label: str,
    style: Mapping[str, str],
    *,
    scale: float = 1.0,
) -> None:
    """A curve of means with its 95 % bootstrap band; `curves` maps x to the values of all seeds."""
    xs = sorted(curves)
    means, lows, highs = np.array([bootstrap_mean(curves[x]) for x in xs]).T * scale
    axis.plot(xs, means, label=label, markevery=max(1, len(xs) // 8), markersize=5, **style)
    axis.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
