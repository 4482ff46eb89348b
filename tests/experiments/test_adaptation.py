"""The adaptation experiment: what it learns, that it compares like with like, what it refuses."""

import functools

import jax
import numpy as np
import optax
import pytest
from killing import assert_survives_kills

from experiments.optimizers import Method, Optimizer
from experiments.penalties import FromReference
from experiments.tasks.adaptation import Adaptation
from trustjax.data import digits
from trustjax.losses import mesa_penalty
from trustjax.models import MLP
from trustjax.optim import sam, tram

METHODS = {
    "adamw": Method(Optimizer(optax.adamw), 3e-3),
    "sam": Method(Optimizer(optax.adamw, sam, {"rho": 0.05}), 3e-3),
    "tram": Method(Optimizer(optax.adamw, tram, {"scale": 1.0}), 3e-3),
}
SMALL = {
    "data": digits,
    "model": functools.partial(MLP, hidden=(32,)),
    "methods": METHODS,
    "num_seeds": 2,
    "target": "rotation:2",
    "unseen": ("blur:3", "contrast:3"),
    "seed": 0,
    "precision": "float32",
    "source": None,
    "only": (),
    "pretrain_learning_rate": 3e-3,
    "finetune_examples": 200,
    "batch_size": 64,
    "input_noise": 0.1,
    "max_test_examples": 1000,
    "sharpness_examples": 256,
    "pretrain_steps": 60,
    "finetune_steps": 60,
    "steps_per_chunk": 30,
}


def train(task):
    """All stages in order; the rows of metrics.csv and the final states."""
    task.validate()
    final, rows = {}, []
    for stage in task.stages():
        state, batches = stage.init(final), stage.batches()
        for step in range(0, stage.num_steps, stage.steps_per_chunk):
            state, new = stage.advance(state, batches, step, stage.steps_per_chunk)
            rows += [{"stage": stage.name, "step": step + stage.steps_per_chunk} | r for r in new]
        last = {"stage": stage.name, "step": stage.num_steps}
        rows += [last | row for row in stage.finish(state)]
        final[stage.name] = state
    return rows, final


@pytest.fixture(scope="module")
def trained():
    return train(Adaptation(**SMALL))


def test_it_adapts(trained, tmp_path):
    """Fails with the gradient's sign flipped, or without fine-tuning on the target."""
    rows, _ = trained
    task = Adaptation(**SMALL)
    values, table = task.summarize(rows)
    before = values["pretrain"]["final/target"]["mean"]
    for name in METHODS:
        after = values[name]["final/target"]
        assert after["mean"] > before + 0.1
        assert after["low"] <= after["mean"] <= after["high"]
        assert len(after["seeds"]) == 2
    assert values["pretrain"]["final/source"]["mean"] > 0.6
    assert [row[0] for row in table.rows] == ["pretrain", *METHODS]
    task.plot(rows, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "learning_curves.png",
        "gains.png",
        "target_and_unseen.png",
        "trust_radius.png",
    }


def test_plots_of_methods_without_an_attack(trained, tmp_path):
    Adaptation(**SMALL | {"only": ["adamw"]}).plot(trained[0], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"learning_curves.png", "target_and_unseen.png"}


def test_unseen_accuracy_is_the_mean_over_its_domains(trained):
    for row in trained[0]:
        if "final/unseen" in row:
            domains = [row["final/blur:3"], row["final/contrast:3"]]
            assert row["final/unseen"] == pytest.approx(np.mean(domains))


def test_methods_start_from_the_same_network_and_see_the_same_batches(trained):
    _, final = trained
    stages = Adaptation(**SMALL).stages()[1:]
    starts = [stage.init(final).params for stage in stages]
    batches = [next(stage.batches()) for stage in stages]
    for other in starts[1:]:
        jax.tree.map(np.testing.assert_array_equal, starts[0], other)
    for other in batches[1:]:
        jax.tree.map(np.testing.assert_array_equal, batches[0], other)
    assert not np.array_equal(batches[0]["image"][0], batches[0]["image"][1])  # seeds differ


@pytest.mark.slow
def test_seeds_in_a_vmap_do_what_they_do_alone(trained):
    """The first of two seeds trains as the only one does."""
    rows, _ = train(Adaptation(**SMALL | {"num_seeds": 1, "only": ["tram"]}))
    (alone,) = [r for r in rows if r["stage"] == "tram" and "final/target" in r]
    together = [r for r in trained[0] if r["stage"] == "tram" and "final/target" in r]
    assert alone["final/target"] == pytest.approx(together[0]["final/target"], abs=0.02)


@pytest.mark.slow
def test_search_ranks_by_validation_accuracy_and_never_sees_test_examples():
    rates = {"learning_rate": (1e-5, 3e-3)}
    search = {"grid": {"adamw": rates, "sam": {**rates, "rho": (0.05,)}}}
    task = Adaptation(**SMALL | search | {"only": ["adamw", "sam"], "num_seeds": 1})
    rows, _ = train(task)
    best = task.summarize(rows).values["best"]
    assert {best[name]["learning_rate"] for name in best} == {3e-3}
    images = {image.tobytes() for image in np.asarray(task._held_out["image"][0])}
    test_images = np.asarray(Adaptation(**SMALL)._held_out["image"][1])
    shared = sum(image.tobytes() in images for image in test_images)
    assert shared == 0


@pytest.mark.slow
def test_search_varies_the_weight_of_a_penalty():
    """Seeds side by side with weights; the heavier, the closer to the start the function stays."""
    to_start = FromReference(mesa_penalty, decay=1.0)
    method = Method(Optimizer(optax.adamw, sam, {"rho": 0.05}), 3e-3, to_start)
    only = {"methods": {"start": method}, "num_seeds": 1}
    search = {"grid": {"start": {"weight": (0.0, 1.0, 30.0)}}}
    rows, final = train(Adaptation(**SMALL | only | search))
    last = [row for row in rows if row["stage"] == "start" and row["step"] == 60]
    finals = [row for row in last if "final/accuracy" in row]
    assert [(row["rho"], row["weight"]) for row in finals] == [(0.05, w) for w in (0.0, 1.0, 30.0)]
    penalties = [row["train/penalty"] for row in last if "train/penalty" in row]
    assert penalties[0] > 1.2 * penalties[1] > 1.2**2 * penalties[2] > 0
    start, reference = final["pretrain"].params, final["start"].reference
    for lane in range(3):
        jax.tree.map(
            lambda s, r, i=lane: np.testing.assert_array_equal(s[0], r[i]), start, reference
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"finetune_steps": 0}, "finetune_steps must be >= 1, got 0"),
        ({"finetune_examples": 3}, "finetune_examples must be >= batch_size = 64, got 3"),
        ({"input_noise": -1.0}, "input_noise must be >= 0"),
        ({"pretrain_learning_rate": 0.0}, "pretrain_learning_rate must be > 0"),
        ({"only": ["samm"]}, "only must name methods of .*, got 'samm'"),
        ({"target": "rotatoin:2"}, "rotation"),
        ({"unseen": ["blur:9"]}, "blur:9"),
    ],
)
def test_refused_before_data_is_loaded(changes, words):
    def no_data():
        raise AssertionError("data was loaded")

    with pytest.raises(ValueError, match=words):
        Adaptation(**SMALL | {"data": no_data} | changes).validate()


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"adamw": {"learning_rate": [1e-3, 3e-3]}, "sam": {"rho": [0.1]}}, "equally many trials"),
        ({"adamw": {"learning_rate": [1e-3]}}, "equally many trials, got .*'sam': 0"),
        (
            {"adamw": {"rho": [0.1]}},
            r"grid.adamw must name some of \['learning_rate'\], got \['rho",
        ),
    ],
)
def test_bad_grids(grid, words):
    task = Adaptation(**SMALL | {"only": ["adamw", "sam"]}, grid=grid)
    with pytest.raises(ValueError, match=words):
        task.validate()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    overrides = [
        "+exp=tram_vision",
        "num_seeds=2",
        "task.only=[sam,tram]",
        "task.pretrain_steps=60",
        "task.finetune_steps=60",
        "task.steps_per_chunk=10",
        "checkpoint.every=20",
    ]
    assert_survives_kills(overrides, tmp_path, num_kills=10)
