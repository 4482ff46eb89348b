"""The experiment with a sharp and a flat minimum."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.analysis.statistics import share_interval
from experiments.tasks.landscape import FLAT, SHARP, Landscape, Walkers, measure
from experiments.tasks.two_minima import TwoMinima
from experiments.tasks.two_minima_report import ends
from experiments.trackers import Row
from trustjax.optim import asam, sam

LANDSCAPE = Landscape(sharp=0.3, flat=1.0)


def task(**changes: Any) -> TwoMinima:
    small = {"num_seeds": 2, "num_starts": 3, "steps": 4, "steps_per_chunk": 2, "noise": 0.0}
    return TwoMinima(
        optax.sgd(0.1), **{**small, "methods": {"sam": sam}, "radii": [0.5], **changes}
    )


def height(w: np.ndarray) -> float:
    """The formula of the docstring, in NumPy."""
    to_sharp, to_flat = (float(np.sum((w - np.array(c)) ** 2)) for c in (SHARP, FLAT))
    wells = np.exp(-to_sharp / 2 / 0.3**2) + 0.8 * np.exp(-to_flat / 2)
    return float(1 + 0.03 * np.sum(w**2) - wells)


def slope(w: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of `height`."""
    shifts = step * np.eye(2)
    return np.array([(height(w + s) - height(w - s)) / (2 * step) for s in shifts])


@pytest.mark.usefixtures("x64")
def test_landscape() -> None:
    places = np.array([SHARP, FLAT, (0.3, -0.7)])
    heights = jax.jit(jax.vmap(LANDSCAPE))(places)
    np.testing.assert_allclose(heights, [height(w) for w in places], rtol=1e-12)
    assert heights[0] < heights[1]
    sharp, flat, _ = np.linalg.eigvalsh(jax.jit(jax.vmap(jax.hessian(LANDSCAPE)))(places))[:, -1]
    assert sharp > 10 * flat


@pytest.mark.usefixtures("x64")
def test_steps_by_hand() -> None:
    alone, attacked = task(precision="float64").stages()
    start = alone.init({})
    for stage, rho in ((alone, 0.0), (attacked, 0.5)):
        state, paths = stage.walk(stage.init({}), 0, 2)
        w = np.array(start.position[1, 2])
        for step in range(2):
            gradient = slope(w)
            w = w - 0.1 * slope(w + rho * gradient / np.linalg.norm(gradient))
            np.testing.assert_allclose(paths[1, 2, step], w, rtol=1e-7)
        np.testing.assert_array_equal(state.position, paths[:, :, -1])


def test_noise_is_the_same_for_every_method_and_differs_between_walkers_and_steps() -> None:
    noisy = task(noise=1.0)
    flat_floor = dataclasses.replace(noisy, sharp_width=1e-3, flat_width=1e-3)
    moves = []
    for stage in flat_floor.stages():
        start = Walkers(jnp.zeros((2, 3, 2)), stage.init({}).optimizer)
        _, paths = stage.walk(start, 0, 2)
        moves.append(np.diff(paths, axis=2, prepend=0).reshape(-1, 2))
    # Only the bowl pulls, so that the attack of length 0.5 moves the gradient by 0.03 at most.
    np.testing.assert_allclose(moves[0], moves[1], atol=0.1 * 0.04)
    assert len(np.unique(moves[0].round(3), axis=0)) == 12


def test_chunks_make_no_difference() -> None:
    stage = task(noise=1.0).stages()[1]
    whole, _ = stage.walk(stage.init({}), 0, 4)
    half, _ = stage.walk(stage.init({}), 0, 2)
    halves, _ = stage.walk(half, 2, 2)
    np.testing.assert_allclose(whole.position, halves.position, rtol=1e-5)


def test_measure() -> None:
    places = jnp.array([[SHARP, FLAT, (2.0, 1.0), (-1.5, 0.1)], [FLAT, FLAT, FLAT, FLAT]])
    measures = measure(places, landscape=LANDSCAPE)
    np.testing.assert_allclose(measures["flat"], [0.5, 1.0])
    expected = np.mean([height(np.array(w)) for w in places[0].tolist()])
    np.testing.assert_allclose(measures["loss"][0], expected, rtol=1e-5)


def test_precision_is_kept() -> None:
    stage = task(precision="bfloat16", noise=1.0).stages()[1]
    state, rows = stage.advance(stage.init({}), None, 0, 2)
    assert state.position.dtype == jnp.bfloat16
    assert all(0 <= float(row["flat"]) <= 1 for row in rows)


def test_a_large_radius_leaves_the_sharp_minimum() -> None:
    walk = task(noise=1.0, num_starts=50, steps=400, radii=[0.8])
    shares = []
    for stage in walk.stages():
        state, _ = stage.walk(stage.init({}), 0, 400)
        shares.append(float(measure(state.position, landscape=LANDSCAPE)["flat"].mean()))
    assert shares[0] < 0.8 < 0.9 < shares[1]  # 0.64 and 0.98 from a thousand starts


def test_interval() -> None:
    _, low, high = share_interval(0.5, 1000)
    expected = 1.96 * np.sqrt(0.25 / 1000)
    np.testing.assert_allclose([0.5 - low, high - 0.5], expected, rtol=0.05)


def test_summary_takes_the_last_rows() -> None:
    walk = task(methods={"sam": sam, "asam": asam})
    names = [stage.name for stage in walk.stages()]
    assert names == ["sgd", "sam_0.5", "asam_0.5"]
    rows: list[Row] = [
        {"stage": name, "step": step, "seed": seed, "flat": step / 4 - seed / 2, "loss": step}
        for name in names
        for step in (2, 4)
        for seed in range(2)
    ]
    assert {end.flat for end in ends(rows, dict.fromkeys(names, 0.5), 6).values()} == {0.75}
    summary = walk.summarize(rows)
    assert list(summary.values) == names
    assert [line[0] for line in summary.table.rows] == names
    assert {len(line) for line in summary.table.rows} == {len(summary.table.columns)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"steps_per_chunk": 0}, "steps_per_chunk must be >= 1, got 0"),
        ({"num_starts": 0}, "num_starts must be >= 1, got 0"),
        ({"noise": -1.0}, r"noise must be >= 0, got -1\.0"),
        ({"sharp_width": 0.0}, r"sharp_width must be > 0, got 0\.0"),
        ({"flat_width": float("nan")}, "flat_width must be > 0, got nan"),
        ({"radii": []}, r"radii must be different numbers > 0, got \[\]"),
        ({"radii": [0.1, 0.1]}, "radii must be different"),
        ({"radii": [0.0]}, "radii must be different numbers > 0"),
        ({"methods": {"sam": functools.partial(sam, eta=-1.0)}}, r"methods\.sam: eta must be >= 0"),
    ],
)
def test_validate(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        task(**changes).validate()


def test_defaults_are_valid() -> None:
    task().validate()
