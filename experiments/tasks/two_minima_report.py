"""Table and plots of `two_minima`."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from experiments import plots
from experiments.loop import Row, Summary, Table
from experiments.statistics import share_interval
from experiments.tasks.two_minima import CORNER, FLAT, SHARP, Landscape, TwoMinima, Walk, measure

# The two wells, and the walkers that end in them
WELLS = {"sharp": plots.COLORS[5], "flat": plots.COLORS[4]}


class End(NamedTuple):
    """Where the walkers of a stage end.

    Attributes:
      radius: of the method, 0 for the optimizer alone.
      flat: share of the walkers in the basin of the flat minimum.
      interval: 95 % Wilson interval of that share over walkers.
      loss: mean over walkers.
    """

    radius: float
    flat: float
    interval: tuple[float, float]
    loss: float


def ends(task: TwoMinima, rows: list[Row]) -> dict[str, End]:
    """The end of every stage, from its last rows."""
    found = {}
    for stage in task.stages():
        last = [r for r in rows if r["stage"] == stage.name and r["step"] == task.steps]
        flat, loss = (float(np.mean([row[name] for row in last])) for name in ("flat", "loss"))
        _, *interval = share_interval(flat, task.num_seeds * task.num_starts)
        found[stage.name] = End(stage.radius, flat, (interval[0], interval[1]), loss)
    return found


def summarize(task: TwoMinima, rows: list[Row]) -> Summary:
    """Share of walkers that end in the flat minimum, with its interval, by stage."""
    found = ends(task, rows)
    lines = [
        (name, f"{end.flat:.3f}", "{:.3f} to {:.3f}".format(*end.interval), f"{end.loss:.3f}")
        for name, end in found.items()
    ]
    columns = ("method", "share", "95 % Wilson interval", "loss")
    table = Table("Walkers that end in the flat minimum", columns, lines)
    return Summary({name: end._asdict() for name, end in found.items()}, table)


def plot(task: TwoMinima, rows: list[Row], folder: Path) -> None:
    """share.png: share against radius; landscape.png: the loss and some paths."""
    found = ends(task, rows)
    figure, (axis,) = plots.panels(1, width=6, height=4)
    _plot_share(axis, task, found)
    plots.save(figure, folder / "share.png")
    stages = {stage.name: stage for stage in task.stages()}
    best = max(list(found)[1:], key=lambda name: found[name].flat, default="sgd")
    figure, (profile, *maps) = plots.panels(3, width=4)
    _plot_profile(profile, task.landscape)
    for axis, name in zip(maps, ("sgd", best), strict=True):
        _plot_paths(axis, stages[name])
    plots.save(figure, folder / "landscape.png")


def _plot_share(axis: Axes, task: TwoMinima, found: Mapping[str, End]) -> None:
    style = plots.styles(["sgd", *task.methods])
    alone, color = found["sgd"], style["sgd"]["color"]
    axis.axhspan(*alone.interval, color=color, alpha=0.15, linewidth=0)
    axis.axhline(alone.flat, color=color, linestyle="--", label="sgd")
    for name in task.methods:
        points = [found[f"{name}_{radius:g}"] for radius in sorted(task.radii)]
        radii = [point.radius for point in points]
        low, high = zip(*(point.interval for point in points), strict=True)
        axis.fill_between(radii, low, high, color=style[name]["color"], alpha=0.15, linewidth=0)
        axis.plot(radii, [point.flat for point in points], label=name, **style[name])
    axis.set(xlabel="radius rho", ylabel="share of the walkers", xlim=(0, None), ylim=(None, 1.01))
    axis.set(title="Starts that end in the flat minimum (band: 95 % Wilson interval)")
    axis.legend()


def _heights(landscape: Landscape, x: np.ndarray, y: np.ndarray) -> jax.Array:
    points = np.stack(np.meshgrid(x, y), axis=-1)
    heights: jax.Array = jax.jit(jnp.vectorize(landscape, signature="(d)->()"))(points)
    return heights


def _plot_profile(axis: Axes, landscape: Landscape) -> None:
    x = np.linspace(-1.15 * CORNER[0], 1.15 * CORNER[0], 300)
    axis.plot(x, _heights(landscape, x, np.zeros(1))[0], color="black")
    axis.set(title="loss along w[1] = 0", xlabel="w[0]", ylabel="loss", ylim=(-0.3, None))
    for (place, _), (name, color) in zip((SHARP, FLAT), WELLS.items(), strict=True):
        axis.text(place, -0.22, name, color=color, ha="center", weight="bold")


def _plot_paths(axis: Axes, stage: Walk, num_paths: int = 14) -> None:
    landscape = stage.task.landscape
    x, y = (np.linspace(-1.15 * c, 1.15 * c, 150) for c in CORNER)
    axis.contourf(x, y, _heights(landscape, x, y), levels=20, cmap="Greys", alpha=0.4)
    start = jax.tree.map(lambda leaf: leaf[:1, :num_paths], stage.init({}))
    _, paths = stage.walk(start, 0, stage.num_steps)
    in_flat = measure(paths[0, :, -1:], landscape=landscape)["flat"]
    points = np.concatenate([start.position[0, :, None], paths[0]], axis=1).astype(float)
    for path, flat in zip(points, in_flat, strict=True):
        color = WELLS["flat" if flat else "sharp"]
        axis.plot(*path.T, color=color, linewidth=0.5, alpha=0.6)
        axis.plot(*path[0], "o", color="white", markeredgecolor="black", markersize=5)
        axis.plot(*path[-1], "s", color=color, markeredgecolor="white", markersize=7, zorder=3)
    axis.set(title=f"{stage.name}: circle to square", xlabel="w[0]", ylabel="w[1]")
