"""Episodes of flying base stations as a picture and as a GIF: map, coverage, rates."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from experiments.analysis import plots, rendering
from trustjax.envs import MultiUAV, uav_channel
from trustjax.envs.uav import UAVState

# Vehicle colours: the palette without its black and its grey, which the users and the grid have.
_COLORS = (*plots.COLORS[4:6], *plots.COLORS[3:4], *plots.COLORS[6:7], *plots.COLORS[1:3],
           "#8C564B", "#000000")  # fmt: skip
_CELLS = 72  # of the coverage map, along one side
_MOST_FRAMES = 200
_MILLISECONDS = 120


def coverage(env: MultiUAV, state: UAVState, cells: int = _CELLS) -> jax.Array:
    """The spectral efficiency that a user would have, bit/s/Hz, float [cells, cells], rows north.

    It is that of the strongest vehicle with the interference of the others on its channel.
    """
    middle = env.area * (jnp.arange(cells) + 0.5) / cells
    places = jnp.stack(jnp.meshgrid(middle, middle), -1).reshape(-1, 2)
    scene = uav_channel.SCENES[env.scene]
    gains = uav_channel.channel_gains(state.vehicles, places, scene, env.carrier)
    serving = uav_channel.associate(state.power, gains)
    ratio = uav_channel.signal_to_interference(
        state.power, gains, serving, env.noise, state.channel
    )
    return uav_channel.spectral_efficiency(ratio).reshape(cells, cells)


def draw_flight(env: MultiUAV, states: UAVState, path: Path) -> None:
    """Writes a PNG: the flight over the map with the coverage at its end, and rates over time.

    Args:
      env: The environment.
      states: States of one episode, in NumPy arrays with a leading axis of time.
      path: File to write.
    """
    figure = Figure(figsize=(11.5, 5.8), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[1.25, 1])
    scene = _Map(env, states, figure.add_subplot(grid[:, 0]))
    scene.show(len(states.step) - 1)
    _draw_rates(env, states, [figure.add_subplot(grid[row, 1]) for row in range(3)])
    plots.save(figure, path)


def write_flight_gif(env: MultiUAV, states: UAVState, path: Path) -> None:
    """Writes the map at each step as a GIF, whole or not at all; `states` as for `draw_flight`.

    Episodes of more than 200 steps are shown by every second, third ... state, at the same speed.
    """
    last = len(states.step) - 1
    every = math.ceil((last + 1) / _MOST_FRAMES)
    figure = Figure(figsize=(5.6, 4.9), dpi=100, layout="constrained")
    scene = _Map(env, states, figure.add_subplot())
    canvas = FigureCanvasAgg(figure)
    pictures = []
    for step in sorted({*range(0, last + 1, every), last}):
        scene.show(step)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        pictures.append(picture.quantize(256, dither=Image.Dither.NONE))
    rendering.save_gif(pictures, path, duration=every * _MILLISECONDS)


class _Map:
    """The square from above, whose artists move from step to step."""

    def __init__(self, env: MultiUAV, states: UAVState, axis: Axes) -> None:
        self._env, self._states, self._axis = env, states, axis
        self._jain = np.asarray(uav_channel.jain_index(states.rates))
        self._number = states.vehicles.shape[1]
        self._paths = states.vehicles[..., :2]
        self._coverage = np.asarray(
            jax.jit(jax.lax.map, static_argnums=0)(lambda state: coverage(env, state), states)
        )
        most = float(np.quantile(self._coverage, 0.99))
        self._image = axis.imshow(
            self._coverage[-1], origin="lower", extent=(0, env.area, 0, env.area), cmap="Greys",
            vmin=0, vmax=1.6 * most, interpolation="bilinear", zorder=0,
        )  # fmt: skip
        bar = axis.figure.colorbar(self._image, ax=axis, shrink=0.82, pad=0.01)
        bar.set_label("spectral efficiency of a user there, bit/s/Hz", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.ax.set_ylim(0, most)
        self._links = LineCollection([], linewidths=0.7, alpha=0.6, zorder=2)
        self._walks = LineCollection([], linewidths=0.8, colors="#666666", linestyles=":", zorder=1)
        for lines in (self._links, self._walks):
            axis.add_collection(lines)
        self._trails = [
            axis.plot([], [], color=_COLORS[i], linewidth=1.8, alpha=0.85, zorder=3)[0]
            for i in range(self._number)
        ]
        self._users = axis.scatter([], [], zorder=4, edgecolors="white", linewidths=0.7)
        colors = list(_COLORS[: self._number])
        x, y = self._paths[0].T
        axis.scatter(x, y, s=38, facecolors="white", edgecolors=colors, linewidths=1.5, zorder=5)
        self._vehicles = axis.scatter(
            x, y, s=130, marker="^", c=colors, edgecolors="black", linewidths=0.9,
            zorder=6,
        )  # fmt: skip
        axis.set(
            xlim=(0, env.area), ylim=(0, env.area), aspect="equal", xlabel="x, m", ylabel="y, m"
        )
        axis.tick_params(labelsize=8)

    def show(self, step: int) -> None:
        """Moves everything to where it is at a step."""
        states = self._states
        users, serving, rates = states.users[: step + 1], states.serving[step], states.rates[step]
        self._image.set_data(self._coverage[step])
        for i, trail in enumerate(self._trails):
            trail.set_data(*self._paths[: step + 1, i].T)
        self._vehicles.set_offsets(self._paths[step])
        colors = [_COLORS[i] for i in serving]
        self._users.set_offsets(users[-1])
        self._users.set_facecolor(colors)
        # The area of a user's disc grows with the rate.
        largest = max(float(states.rates.max()), 1e-9)
        self._users.set_sizes(18 + 130 * rates / largest)
        self._links.set_segments(list(np.stack([users[-1], self._paths[step][serving]], 1)))
        self._links.set_color(colors)
        self._walks.set_segments(list(users.swapaxes(0, 1)))
        seconds = step * self._env.time_step
        self._axis.set_title(
            f"{seconds:.0f} s   together {rates.sum() / 1e6:.2f} Mbit/s   "
            f"Jain's index {self._jain[step]:.2f}",
            fontsize=10,
        )


def _draw_rates(env: MultiUAV, states: UAVState, axes: list[Axes]) -> None:
    """Rates of users, of vehicles and fairness over time."""
    seconds = env.time_step * np.arange(len(states.step))
    each, both, fair = axes
    for rates in states.rates.T:
        each.plot(seconds, rates / 1e3, color="#888888", linewidth=0.8, alpha=0.7)
    each.plot(seconds, states.rates.mean(1) / 1e3, color="#000000", linewidth=2, label="mean")
    each.set_ylabel("user, kbit/s")
    each.set_title("Rates of users (grey) and their mean", fontsize=9)
    bottom = np.zeros(len(seconds))
    for i in range(states.vehicles.shape[1]):
        top = bottom + np.where(states.serving == i, states.rates, 0).sum(1) / 1e6
        both.fill_between(seconds, bottom, top, color=_COLORS[i], alpha=0.75, linewidth=0)
        bottom = top
    both.set_ylabel("Mbit/s")
    both.set_title("Rates of the vehicles' users together", fontsize=9)
    fair.plot(
        seconds, np.asarray(uav_channel.jain_index(states.rates)), color="#000000", linewidth=1.5
    )
    fair.set(ylabel="Jain's index", ylim=(0, 1.02), xlabel="time, s")
    fair.set_title("Fairness among users", fontsize=9)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, seconds[-1])
        axis.tick_params(labelsize=8)
        if axis is not fair:
            axis.set_ylim(bottom=0)
            axis.set_xticklabels([])
