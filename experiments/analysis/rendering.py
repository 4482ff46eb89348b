"""Pictures of episodes: GIF frames drawn from observations, and brax's HTML page.

gymnax has a Visualizer (1.0.1), which is not used here. For control tasks it needs pygame, which
gymnax does not install, and a quarter of a second per frame; and it misses the state in which an
episode ends.
"""

import colorsys
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageDraw, ImageFont

from experiments.analysis import plots
from experiments.runtime.files import replacing, write_text
from trustjax.envs import Environment
from trustjax.envs.third_party import building, import_extra

_WIDTH, _TITLE = 400, 28  # width of a frame and height of its title, in pixels
_SMOOTH = 2  # shapes are drawn larger by this factor, then shrunk, which smooths their edges
_MOST_FRAMES = 1000
_MOST_LINES = 8
_FINEST = 20  # milliseconds per frame; browsers show shorter frames for 100

Point = tuple[float, float]
_BACK, _FRONT, _GREY = "#FFFFFF", "#000000", "#BBBBBB"
_BLUE, _ORANGE, _GREEN = plots.COLORS[4], plots.COLORS[1], plots.COLORS[3]


class Episode(NamedTuple):
    """One episode, T steps long, in NumPy arrays.

    Attributes:
      observations: Observations [T + 1, *observation_shape], the last one at the end.
      rewards: Rewards [T].
      ended: Whether the episode came to its end; False if the caller stopped it.
      scenes: What is drawn in place of observations before each step, [T, ...]: positions and
        rotations of brax's bodies, or states of flying base stations; None for others.
    """

    observations: np.ndarray
    rewards: np.ndarray
    ended: bool
    scenes: Any = None


# GIF


def write_gif(env: Environment, episode: Episode, path: Path) -> None:
    """Writes the frames as a GIF, whole or not at all.

    Episodes of more than a thousand steps are shown by every second, third ... frame, at the same
    speed.
    """
    every = math.ceil(len(episode.observations) / _MOST_FRAMES)
    save_gif(frames(env, episode, every), path, duration=every * _duration(env))


def save_gif(pictures: Iterable[Image.Image], path: Path, *, duration: int) -> None:
    """Writes pictures as a GIF, whole or not at all; each is shown for `duration` milliseconds."""
    first, *others = pictures
    with replacing(path) as beside:
        first.save(
            beside, format="GIF", save_all=True, append_images=others, loop=0,
            duration=[duration] * len(others) + [1000],  # shows the end for a second
        )  # fmt: skip


def frames(env: Environment, episode: Episode, every: int = 1) -> Iterator[Image.Image]:
    """Pictures of every `every`-th observation and of the last, with step and return so far."""
    last = len(episode.observations) - 1
    returns = np.concatenate([[0.0], np.cumsum(episode.rewards, dtype=np.float64)])
    paint = _painter(env, episode)
    for step in sorted({*range(0, last + 1, every), last}):
        picture = paint(step)
        frame = Image.new("RGB", (_WIDTH, picture.height + _TITLE), _BACK)
        frame.paste(picture, ((_WIDTH - picture.width) // 2, _TITLE))
        title = f"{_own_name(env)}   step {step}   return {returns[step]:.6g}"
        ImageDraw.Draw(frame).text((8, 6), title, _FRONT, ImageFont.load_default(14))
        # Eight bits per pixel, as in a GIF, so that a thousand frames fit into memory.
        yield frame.quantize(128, dither=Image.Dither.NONE)


def _painter(env: Environment, episode: Episode) -> Callable[[int], Image.Image]:
    """A function that makes the picture of a step."""
    observations = episode.observations
    scene = _SCENES.get(env.name)
    if scene:
        return lambda step: scene.paint(observations[step].tolist(), env.default_params)
    if observations.ndim in (3, 4) and min(observations.shape[1:3]) > 1:
        most = max(float(observations.max()), 1e-6)
        return lambda step: _grid(observations[step], most)
    return _over_time(observations.reshape(len(observations), -1))


def _own_name(env: Environment) -> str:
    return env.name.partition(":")[2]


def _duration(env: Environment) -> int:
    """Milliseconds per step: the simulated time, where it is known."""
    scene = _SCENES.get(env.name)
    return max(_FINEST, scene.duration) if scene else 100 if len(env.observation_shape) > 1 else 50


# Scenes


class _Canvas:
    """A picture of the rectangle between two corners of the plane; y points up."""

    def __init__(self, low: Point, high: Point) -> None:
        self._left, self._top = low[0], high[1]
        self._scale = _SMOOTH * _WIDTH / (high[0] - low[0])
        height = round(self._scale / _SMOOTH * (high[1] - low[1]))
        self._image = Image.new("RGB", (_SMOOTH * _WIDTH, _SMOOTH * height), _BACK)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[Point], color: str, width: float) -> None:
        """Draws a line through points, `width` pixels wide, with round ends if it is wide."""
        pixels = [self._to_pixels(point) for point in points]
        self._draw.line(pixels, color, round(_SMOOTH * width), joint="curve")
        if width > 4:
            for x, y in (pixels[0], pixels[-1]):
                self._round(x, y, _SMOOTH * width / 2, color)

    def disc(self, center: Point, radius: float, color: str) -> None:
        """Draws a filled circle; `radius` is a length in the plane."""
        self._round(*self._to_pixels(center), radius * self._scale, color)

    def polygon(self, points: Sequence[Point], color: str) -> None:
        """Draws a filled polygon."""
        self._draw.polygon([self._to_pixels(point) for point in points], color)

    def finish(self) -> Image.Image:
        """The picture at its final size."""
        return self._image.reduce(_SMOOTH)

    def _to_pixels(self, point: Point) -> Point:
        return (point[0] - self._left) * self._scale, (self._top - point[1]) * self._scale

    def _round(self, x: float, y: float, radius: float, color: str) -> None:
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)


def _cart_pole(observation: Sequence[float], params: Any) -> Image.Image:
    """A cart between its bounds; the angle is 0 upright and grows to the right."""
    x, _, angle, _ = observation
    bound, pole = float(params.x_threshold), 2 * float(params.length)
    unit = bound / 2.4  # of the shapes, for bounds that are not the usual ones
    canvas = _Canvas((-1.2 * bound, -0.4 * unit), (1.2 * bound, 0.5 * unit + pole))
    canvas.line([(-1.2 * bound, 0), (1.2 * bound, 0)], _GREY, 2)
    for side in (-bound, bound):
        canvas.line([(side, -0.2 * unit), (side, 0.2 * unit)], _GREY, 2)
    w, h = 0.3 * unit, 0.15 * unit
    canvas.polygon([(x - w, -h), (x + w, -h), (x + w, h), (x - w, h)], _FRONT)
    canvas.line([(x, h), (x + pole * math.sin(angle), h + pole * math.cos(angle))], _ORANGE, 8)
    canvas.disc((x, h), 0.05 * unit, _BLUE)
    return canvas.finish()


def _pendulum(observation: Sequence[float], params: Any) -> Image.Image:
    """A rod; the angle is 0 upright and grows to the left."""
    del params
    up, left, _ = observation
    canvas = _Canvas((-2.0, -1.2), (2.0, 1.2))
    canvas.line([(0, 0), (-left, up)], _ORANGE, 14)
    canvas.disc((0, 0), 0.05, _FRONT)
    return canvas.finish()


def _acrobot(observation: Sequence[float], params: Any) -> Image.Image:
    """Two links, which hang down at angle 0, and the height to reach."""
    first = math.atan2(observation[1], observation[0])
    second = first + math.atan2(observation[3], observation[2])
    one, two = float(params.link_length_1), float(params.link_length_2)
    elbow = (one * math.sin(first), -one * math.cos(first))
    tip = (elbow[0] + two * math.sin(second), elbow[1] - two * math.cos(second))
    reach = 1.1 * (one + two)
    canvas = _Canvas((-1.4 * reach, -reach), (1.4 * reach, reach))
    canvas.line([(-1.4 * reach, one), (1.4 * reach, one)], _GREY, 2)
    canvas.line([(0, 0), elbow], _BLUE, 10)
    canvas.line([elbow, tip], _ORANGE, 10)
    for joint in ((0, 0), elbow):
        canvas.disc(joint, 0.06, _FRONT)
    return canvas.finish()


def _mountain_car(observation: Sequence[float], params: Any) -> Image.Image:
    """A car on a curve, and the flag."""
    low, high, goal = (
        float(value) for value in (params.min_position, params.max_position, params.goal_position)
    )

    def height(x: float) -> float:
        return 0.45 * math.sin(3 * x) + 0.55

    x = observation[0]
    canvas = _Canvas((low, 0.0), (high, 1.25))
    canvas.line([(float(at), height(at)) for at in np.linspace(low, high, 100)], _FRONT, 2)
    top = height(goal) + 0.2
    canvas.line([(goal, height(goal)), (goal, top)], _FRONT, 2)
    canvas.polygon([(goal, top), (goal, top - 0.08), (goal + 0.08, top - 0.04)], _GREEN)
    slope = 1.35 * math.cos(3 * x)
    size = 0.045 / math.hypot(1, slope)  # the car stands on the curve
    canvas.disc((x - slope * size, height(x) + size), 0.045, _BLUE)
    return canvas.finish()


class _Scene(NamedTuple):
    """Draws an observation with the environment's parameters; `duration` is ms per step."""

    paint: Callable[[Sequence[float], Any], Image.Image]
    duration: int


_SCENES = {
    "gymnax:CartPole-v1": _Scene(_cart_pole, 20),
    "gymnax:Pendulum-v1": _Scene(_pendulum, 50),
    "gymnax:Acrobot-v1": _Scene(_acrobot, 70),  # 200 in the simulation
    "gymnax:MountainCar-v0": _Scene(_mountain_car, 30),
    "gymnax:MountainCarContinuous-v0": _Scene(_mountain_car, 30),
}


# Other environments


def _grid(observation: np.ndarray, most: float) -> Image.Image:
    """A picture of cells: [h, w] from black to white at `most`, or [h, w, c] with channel colours.

    Where several channels are above 0, the last one is shown.
    """
    height, width = observation.shape[:2]
    if observation.ndim == 2:
        cells = np.repeat(np.clip(255 * observation / most, 0, 255)[..., None], 3, -1)
    else:
        channels = observation.shape[-1]
        cells = np.zeros((height, width, 3))
        for channel, color in enumerate(_hues(channels)):
            cells[observation[..., channel] > 0] = color
    size = max(1, min(320 // height, (_WIDTH - 40) // width))
    pixels = cells.astype(np.uint8).repeat(size, 0).repeat(size, 1)
    if size >= 8:  # lines between cells
        pixels[::size] = pixels[:, ::size] = 40
    return Image.fromarray(pixels)


@functools.cache
def _hues(count: int) -> np.ndarray:
    """Colours that tell channels apart on black; every other one is light."""
    return np.array(
        [
            255 * np.array(colorsys.hsv_to_rgb(i / count, 0.9 if i % 2 else 0.45, 1.0))
            for i in range(count)
        ]
    )


def _over_time(observations: np.ndarray) -> Callable[[int], Image.Image]:
    """Draws components [T, n] over time, as lines or, if there are many, as colours.

    The plot is drawn once; the function returned adds a bar at the step.
    """
    last, count = len(observations) - 1, observations.shape[1]
    figure, (axis,) = plots.panels(1, width=_WIDTH / 100, height=3.2)
    figure.set_dpi(100)
    if count <= _MOST_LINES:
        for i, (name, style) in enumerate(plots.styles(map(str, range(count))).items()):
            shape = {key: style[key] for key in ("color", "linestyle")}
            axis.plot(observations[:, i], label=name, linewidth=1.2, **shape)
        plots.legend(figure, axis)
    else:
        # Every component is scaled to its own range.
        low, high = observations.min(0), observations.max(0)
        scaled = (observations - low) / np.where(high > low, high - low, 1)
        axis.imshow(scaled.T, aspect="auto", interpolation="nearest", cmap="viridis")
        axis.grid(False)
    axis.set(xlabel="step", ylabel="component", xlim=(-0.5, last + 0.5))
    if count <= _MOST_LINES:
        axis.set_ylabel("observation")
    axis.tick_params(labelsize=7)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    plot = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    inside = axis.get_window_extent()
    top, bottom = plot.height - inside.y1, plot.height - inside.y0

    def paint(step: int) -> Image.Image:
        picture = plot.copy()
        x = float(axis.transData.transform((step, 0))[0])
        ImageDraw.Draw(picture).line([(x, top), (x, bottom)], "#D55E00", 2)
        return picture

    return paint


# HTML


class _Pose(NamedTuple):
    """The part of a state that brax's page needs."""

    x: Any


def write_html(env: Environment, episode: Episode, path: Path) -> None:
    """Writes brax's page with the episode in simulated time, whole or not at all.

    The page loads its scripts from a CDN. Raises ModuleNotFoundError if brax is not installed.
    """
    html = import_extra("brax.io.html", install='"trustjax[rl]"')
    inner, repeats = env.unwrapped, env._repeats  # type: ignore[attr-defined]
    transform = type(episode.scenes)
    states = [
        _Pose(transform(pos=pos, rot=rot))
        for pos, rot in zip(episode.scenes.pos, episode.scenes.rot, strict=True)
    ]
    with building():
        system = inner.sys.tree_replace({"opt.timestep": inner.dt * repeats})
        page = html.render(system, states, height="100vh", colab=False)
    write_text(path, page)
