"""Table and plots of `two_minima`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from experiments.analysis import plots
from experiments.analysis.statistics import share_interval
from experiments.runtime.task import Summary, Table
from experiments.tasks.landscape import CORNER, FLAT, SHARP, Landscape, measure
from experiments.trackers import Row

# Colours of the two wells, and of the walkers that end in them
WELLS = {"sharp": plots.COLORS[5], "flat": plots.COLORS[4]}

NUM_PATHS = 14  # paths that are drawn for each of the two stages


class End(NamedTuple):
    """Where the walkers of a stage end.

    Attributes:
      radius: Radius of the method; 0 for the optimizer alone.
      flat: Share of the walkers in the basin of the flat minimum.
      interval: 95 % Wilson interval of that share over walkers.
      loss: Mean loss of the walkers.
    """

    radius: float
    flat: float
    interval: tuple[float, float]
    loss: float


def ends(rows: Sequence[Row], radii: Mapping[str, float], num_walkers: int) -> dict[str, End]:
    """The end of every stage in `radii`, which maps stages to radii, from its last rows."""
    found = {}
    for name, radius in radii.items():
        flat, loss = (
            float(np.mean(plots.last(plots.curve(rows, name, key)))) for key in ("flat", "loss")
        )
        _, *interval = share_interval(flat, num_walkers)
        found[name] = End(radius, flat, (interval[0], interval[1]), loss)
    return found


def best(found: Mapping[str, End]) -> str:
    """The stage with an attack whose walkers end in the flat minimum most often."""
    return max(list(found)[1:], key=lambda name: found[name].flat, default="sgd")


def summarize(found: Mapping[str, End]) -> Summary:
    """Share of the walkers that end in the flat minimum, with its interval, by stage."""
    lines = [
        (name, f"{end.flat:.3f}", "{:.3f} to {:.3f}".format(*end.interval), f"{end.loss:.3f}")
        for name, end in found.items()
    ]
    columns = ("method", "share", "95 % Wilson interval", "loss")
    table = Table("Walkers that end in the flat minimum", columns, lines)
    return Summary({name: end._asdict() for name, end in found.items()}, table)


def plot(
    found: Mapping[str, End], paths: Mapping[str, np.ndarray], landscape: Landscape, folder: Path
) -> None:
    """Writes share.png (share against radius) and landscape.png (the loss and the `paths`).

    `paths` has those of "sgd" and of the best stage, [walkers, steps + 1, 2].
    """
    figure, (axis,) = plots.panels(1, width=6, height=4)
    _plot_share(axis, found)
    plots.save(figure, folder / "share.png")
    figure, (profile, *maps) = plots.panels(3, width=4)
    _plot_profile(profile, landscape)
    for axis, name in zip(maps, ("sgd", best(found)), strict=True):
        _plot_paths(axis, name, paths[name], landscape)
    plots.save(figure, folder / "landscape.png")


def _plot_share(axis: Axes, found: Mapping[str, End]) -> None:
    by_method: dict[str, list[End]] = {}
    for name, end in found.items():
        by_method.setdefault(name.removesuffix(f"_{end.radius:g}"), []).append(end)
    style = plots.styles(by_method)
    (alone,), color = by_method.pop("sgd"), style["sgd"]["color"]
    axis.axhspan(*alone.interval, color=color, alpha=0.15, linewidth=0)
    axis.axhline(alone.flat, color=color, linestyle="--", label="sgd")
    for name, of_method in by_method.items():
        points = sorted(of_method)
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
    for (x_of_well, _), (name, color) in zip((SHARP, FLAT), WELLS.items(), strict=True):
        axis.text(x_of_well, -0.22, name, color=color, ha="center", weight="bold")


def _plot_paths(axis: Axes, name: str, paths: np.ndarray, landscape: Landscape) -> None:
    x, y = (np.linspace(-1.15 * c, 1.15 * c, 150) for c in CORNER)
    axis.contourf(x, y, _heights(landscape, x, y), levels=20, cmap="Greys", alpha=0.4)
    in_flat = measure(jnp.asarray(paths[:, -1:]), landscape=landscape)["flat"]
    for path, flat in zip(paths.astype(float), in_flat, strict=True):
        color = WELLS["flat" if flat else "sharp"]
        axis.plot(*path.T, color=color, linewidth=0.5, alpha=0.6)
        axis.plot(*path[0], "o", color="white", markeredgecolor="black", markersize=5)
        axis.plot(*path[-1], "s", color=color, markeredgecolor="white", markersize=7, zorder=3)
    axis.set(title=f"{name}: circle to square", xlabel="w[0]", ylabel="w[1]")
