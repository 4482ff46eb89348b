"""The look that all figures share: a style per method, bands over seeds, panels without gaps."""

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from experiments.analysis.statistics import Interval, mean_interval
from experiments.runtime.files import replacing
from experiments.trackers import Row

# Okabe and Ito's palette without its yellow, which is too light for lines.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
MOST_TOGETHER = 8  # methods in one panel

# A method looks the same in every figure. Each row has one colour; within a row, lines and markers
# differ. A name that is missing here gets a style from a hash of its letters.
_METHODS = (
    ("adamw", "ppo", "uniform", "auon_released", "mle", "pl_dpo", "sac_learned"),
    ("sam", "sac", "normalized_sgd", "sam_small", "sam_large", "sac_fixed",
     "smoothed", "ppo_minimal"),
    ("asam", "mdpo_one_step", "auon", "asam_large", "asam_r3f", "dpo", "cdpo", "dpo_refreshed"),
    ("tram", "mdpo", "auon_rms", "r3f", "entropy", "adpo", "adpo_pairwise"),
    ("tram_initial", "trpo", "hybrid_auon", "fisher_sam", "adpo_near", "adpo_raw",
     "adpo_raw_refreshed", "asam_trpo"),
    ("tram_noise", "mdpo_tsallis", "muon", "gsam", "adpo_refreshed", "adpo_kde",
     "adpo_kde_refreshed", "mdpo_minimal"),
    ("tram_fisher", "mdpo_tsallis_1_4", "muon_matched", "esam", "rate", "asam_mesa",
     "plackett_luce", "trpo_minimal"),
    ("sgd", "mdpo_forward", "newton_schulz_5", "tram_released", "mesa", "pretrain", "reference",
     "kl_initial"),
)  # fmt: skip
_INDICES = {name: (row, i) for row, names in enumerate(_METHODS) for i, name in enumerate(names)}

# Metrics whose titles are not their names, and those that need a logarithmic axis.
_TITLES = {
    "trust/radius": "Radius of the trust region",
    "trust/distance": "Distance moved in the trust region",
    "trust/used": "Share of the radius used",
    "trust/nonfinite": "Share of second passes that were not finite",
    "kl/new_old": "KL(new, old) per iteration",
    "entropy": "Entropy of the policy",
    "episode/return": "Return in training",
    "episode/length": "Episode length in training",
    "evaluation/return": "Return without noise",
    "final/return": "Final return without noise",
    "final/training_return": "Final return in training",
}
_LOGARITHMIC = {"trust/radius", "trust/distance", "trust/used", "kl/new_old"}

Curve = Mapping[float, Sequence[float]]  # x -> the values of all seeds


class Panel(NamedTuple):
    """The content of one panel: a curve per method.

    Attributes:
      title: Title of the panel.
      curves: Curves by method; methods without a curve are left out.
      settings: Arguments of `Axes.set`, such as labels and scales.
      scale: Factor of all values, such as 100 for percent.
    """

    title: str
    curves: Mapping[str, Curve]
    settings: Mapping[str, Any] = {}
    scale: float = 1.0


def metric_title(metric: str) -> str:
    """The title of a metric's panel."""
    words = metric.replace("final/", "final ").replace("/", " ").replace("_", " ")
    return _TITLES.get(metric, words[:1].upper() + words[1:])


def metric_settings(metric: str) -> dict[str, str]:
    """Arguments of `Axes.set` that the metric has in every figure."""
    return {"yscale": "log"} if metric in _LOGARITHMIC else {}


def curve(
    rows: Iterable[Row], stage: str, metric: str, *, x: str = "step"
) -> dict[float, list[float]]:
    """A metric of a stage: the values of all seeds at each value of the column `x`."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] == stage and row.get(metric, "") != "":
            found[float(row[x])].append(float(row[metric]))
    return dict(found)


def curves(
    rows: Sequence[Row], stages: Iterable[str], metric: str, *, x: str = "step"
) -> dict[str, dict[float, list[float]]]:
    """`curve` of each of several stages."""
    return {stage: curve(rows, stage, metric, x=x) for stage in stages}


def last(curve: Curve) -> Sequence[float]:
    """The values of all seeds at the end of a curve."""
    return curve[max(curve)]


def paired_gain(curve: Curve, baseline: Curve) -> dict[float, list[float]]:
    """Differences of two curves seed by seed, where both have the same number of seeds."""
    return {
        x: [a - b for a, b in zip(curve[x], baseline[x], strict=True)]
        for x in curve
        if len(baseline.get(x, ())) == len(curve[x])
    }


def panels(
    count: int, *, width: float = 4.6, height: float = 3.8, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, in rows of `columns` or in one row; sizes are in inches."""
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


def full_columns(count: int, most: int = 4) -> int:
    """The number of columns, at most `most`, that leaves the fewest cells of the grid empty."""
    return min(range(min(2, count), most + 1), key=lambda c: (-count % c, -c)) if count else 1


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, whole or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a line style for each name, the same in every figure.

    An unknown name takes the next colour that is free, as long as there is one, if the colour that
    its letters lead to is taken. No two of up to 64 names share all three.
    """
    found: dict[str, dict[str, Any]] = {}
    taken: set[tuple[int, int]] = set()
    names = list(names)
    for name in sorted(names, key=lambda name: name not in _INDICES):  # stable: known ones first
        # By CRC, as Python's own hash of a text differs from run to run.
        index = _INDICES.get(name) or divmod(zlib.crc32(name.encode()) % 64, 8)
        used = {row for row, _ in taken} if name not in _INDICES else set()
        while (index in taken or (len(used) < 8 and index[0] in used)) and len(taken) < 64:
            index = ((index[0] + 1) % 8, (index[1] + (index[0] == 7)) % 8)
        taken.add(index)
        row, column = index
        found[name] = {
            "color": COLORS[row],
            "marker": MARKERS[(row + column) % 8],
            "linestyle": LINES[column % 4],
        }
    return {name: found[name] for name in names}


def legend(figure: Figure, axis: Axes) -> None:
    """Adds a legend of `axis` beside the panels, where it covers no curve."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, handlelength=3)


def band(
    axis: Axes,
    curve: Curve,
    label: str,
    style: Mapping[str, Any],
    *,
    scale: float = 1.0,
    logarithmic: bool = False,
) -> None:
    """Draws a curve of means with the band of their 95 % t intervals.

    If it is `logarithmic`, these are geometric means and the intervals of logarithms, which stay
    above 0; where a value is not above 0 the curve has a gap.
    """
    xs = sorted(curve)
    values = [np.array(curve[x], float) for x in xs]
    if logarithmic:
        logs = [np.log(np.where(each > 0, each, np.nan)) for each in values]
        means, lows, highs = np.exp([mean_interval(each) for each in logs]).T * scale
    else:
        means, lows, highs = np.array([mean_interval(each) for each in values]).T * scale
    axis.plot(xs, means, label=label, markevery=max(1, len(xs) // 8), markersize=5, **style)
    axis.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)


def cross(
    axis: Axes, x: Interval, y: Interval, label: str, style: Mapping[str, Any], *, scale: float = 1
) -> None:
    """Draws a point with the intervals of both coordinates; the legend has the point alone."""
    (x_mean, x_low, x_high), (y_mean, y_low, y_high) = np.array([x, y]) * scale
    axis.plot(x_mean, y_mean, label=label, markersize=7, **{**style, "linestyle": "none"})
    line = {"color": style["color"], "linewidth": 1.2, "alpha": 0.7}
    axis.plot([x_low, x_high], [y_mean, y_mean], **line)
    axis.plot([x_mean, x_mean], [y_low, y_high], **line)


def bar_panels(num_panels: int, num_bars: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels that are high enough for `plot_bars` with `num_bars` methods."""
    columns = full_columns(num_panels, most=3)
    return panels(num_panels, columns=columns, width=4.6, height=1.2 + 0.3 * num_bars)


def plot_bars(
    axis: Axes, style: Mapping[str, Mapping[str, str]], found: Mapping[str, Interval]
) -> None:
    """Draws a bar for each method in `found`, from top to bottom in the order of `style`."""
    for y, method in enumerate(style):
        if method in found and np.isfinite(found[method].mean):
            mean, low, high = found[method]
            color = style[method]["color"]
            if np.isfinite(high):
                axis.barh(y, high - low, left=low, height=0.7, color=color, alpha=0.35)
            axis.plot([mean, mean], [y - 0.35, y + 0.35], color=color, linewidth=2.5)
    axis.use_sticky_edges = False  # room beside the outer bars
    axis.set_yticks(range(len(style)), list(style), fontsize=8)
    axis.set_ylim(len(style) - 0.5, -0.5)


def plot_comparison(
    contents: Mapping[str, Mapping[str, Interval]],
    names: Iterable[str],
    baseline: str,
    path: Path,
    *,
    heading: str,
    equal: float,
    **settings: Any,
) -> None:
    """Writes a figure that compares methods with a baseline, with one panel per title.

    Args:
      contents: Intervals by title and method.
      names: All methods, which determine colours and order.
      baseline: Method that has no bar.
      path: PNG file to write.
      heading: Title of the figure.
      equal: Value of a method that is as good as the baseline, where a dotted line stands.
      settings: Arguments of `Axes.set`.
    """
    style = styles(names)
    others = {name: style[name] for name in style if name != baseline} or style
    figure, axes = bar_panels(len(contents), len(others))
    for axis, (title, found) in zip(axes, contents.items(), strict=True):
        plot_bars(axis, others, found)
        axis.axvline(equal, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=title, **settings)
    figure.suptitle(heading, fontsize="medium")
    save(figure, path)


def plot_bands(contents: Sequence[Panel], names: Sequence[str], path: Path) -> None:
    """Writes a figure with a panel for each of `contents`, and a legend that covers no curve.

    Methods without a curve are left out. More than eight of the others are divided into groups,
    each of which begins with the first. Every group has a row of panels of its own, and the rows
    share their scales.
    """
    style = styles(names)  # of all names, so that a colour does not depend on what is drawn
    names = [name for name in names if any(panel.curves.get(name) for panel in contents)]
    groups = grouped(names)
    columns = len(contents) if len(groups) > 1 else full_columns(len(contents))
    figure, axes = panels(len(contents) * len(groups), columns=columns)
    for i in range(len(contents), len(axes)):
        axes[i].sharey(axes[i - len(contents)])
    for i, axis in enumerate(axes):
        group, panel = groups[i // len(contents)], contents[i % len(contents)]
        for name in group:
            if panel.curves.get(name):
                band(
                    axis, panel.curves[name], name, style[name], scale=panel.scale,
                    logarithmic=panel.settings.get("yscale") == "log",
                )  # fmt: skip
        axis.set(title=panel.title, **panel.settings)
        if axis.get_xscale() == "linear" and axis.get_xlim()[1] >= 10_000:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k
        _drop_needless_logarithm(axis)
        if len(groups) > 1 and (i + 1) % columns == 0:
            _group_legend(axis, group, style)
    if len(groups) == 1:
        _shared_legend(figure, axes, names, style)
    save(figure, path)


def _drop_needless_logarithm(axis: Axes) -> None:
    """Makes a logarithmic axis linear if it spans less than a decade, where ticks are not round."""
    low, high = axis.get_ylim()
    if axis.get_yscale() == "log" and high < 10 * low:
        axis.set_yscale("linear")
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.autoscale_view()


def grouped(names: Sequence[str]) -> list[list[str]]:
    """The names in groups of eight at most; if there are several, each begins with the first."""
    if len(names) <= MOST_TOGETHER:
        return [list(names)]
    first, others = names[0], names[1:]
    count = math.ceil(len(others) / (MOST_TOGETHER - 1))
    return [[first, *map(str, group)] for group in np.array_split(np.array(others), count)]


def _handles(names: Iterable[str], style: Mapping[str, Any]) -> list[Line2D]:
    return [Line2D([], [], label=name, markersize=5, **style[name]) for name in names]


def _group_legend(axis: Axes, names: Sequence[str], style: Mapping[str, Any]) -> None:
    axis.legend(
        handles=_handles(names, style), fontsize=8, handlelength=3,
        loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0,
    )  # fmt: skip


def _shared_legend(
    figure: Figure, axes: Sequence[Axes], names: Sequence[str], style: Mapping[str, Any]
) -> None:
    """Adds one legend, in an empty cell of the grid if there is one, else beside the panels."""
    shown = {label for axis in axes for label in axis.get_legend_handles_labels()[1]}
    handles = _handles([name for name in names if name in shown], style)
    grid = axes[0].get_gridspec()
    if grid is not None and len(axes) < grid.nrows * grid.ncols:
        cell = figure.add_subplot(grid[grid.nrows - 1, grid.ncols - 1])
        cell.axis("off")
        cell.legend(handles=handles, loc="upper left", fontsize=9, handlelength=3)
    else:
        width, height = figure.get_size_inches()
        longest = max((len(str(handle.get_label())) for handle in handles), default=0)
        figure.set_size_inches(width + 0.8 + 0.07 * longest, height)
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, handlelength=3)
