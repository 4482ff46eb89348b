"""Pairs of optimizers side by side: equal ones stay together, others do not."""

import functools

import jax
import optax
import pytest

from experiments.tasks.equivalence import Equivalence
from trustjax.data import digits
from trustjax.models import MLP
from trustjax.optim import auon

OTHER = optax.adamw(1e-3)
SMALL = {
    "data": digits,
    "model": functools.partial(MLP, hidden=(64, 64), activation="tanh"),
    "pairs": {
        "same": {"method": optax.sgd(0.1), "control": optax.sgd(0.1)},
        "auon": {
            "method": auon(0.03, other=OTHER),
            "control": auon(0.03, gamma=0.0, other=OTHER),
        },
        "brake": {
            "method": auon(0.03, other=OTHER, brake="rms"),
            "control": auon(0.03, gamma=0.0, other=OTHER),
        },
    },
    "seed": 0,
    "num_seeds": 2,
    "precision": "float64",
    "steps": 40,
    "batch_size": 64,
    "steps_per_chunk": 20,
}


def all_rows(task):
    task.validate()
    rows = []
    for stage in task.stages():
        state = stage.init({})
        for step in range(0, stage.num_steps, stage.steps_per_chunk):
            state, new = stage.advance(state, None, step, stage.steps_per_chunk)
            at = {"stage": stage.name, "step": step + stage.steps_per_chunk}
            rows += [at | row for row in new]
    return rows


@pytest.mark.slow
def test_auon_is_normalised_momentum_sgd(tmp_path):
    """To gamma^2 / (2 N), here 1e-4, while the brake on entries of size 1 is another method."""
    task = Equivalence(**SMALL)
    with jax.enable_x64(True):
        rows = all_rows(task)
    values, table = task.summarize(rows)
    assert values["same"]["difference"] == 0.0
    assert 1e-5 < values["auon"]["difference"] < 4e-4
    assert values["brake"]["difference"] > 0.1
    assert values["auon"]["loss"] == pytest.approx(values["auon"]["loss/control"], rel=1e-3)
    first = [row["loss"] for row in rows if row["stage"] == "auon" and row["seed"] == 0]
    assert first[-1] < 0.9 * first[0]
    assert [row[0] for row in table.rows] == list(SMALL["pairs"])
    task.plot(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"equivalence.png"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"pairs": {"a": {"method": optax.sgd(0.1)}}}, "pairs.a must have method and control"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Equivalence(**SMALL | changes).validate()
