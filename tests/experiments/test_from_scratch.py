"""Training on wrong labels: which labels are wrong, who sees them, and what is reported."""

import functools

import numpy as np
import optax
import pytest
from test_adaptation import train

from experiments.analysis import plots
from experiments.optimizers import Method, Optimizer
from experiments.tasks.from_scratch import FromScratch
from trustjax.data import digits
from trustjax.models import MLP
from trustjax.optim import sam

SMALL = {
    "data": digits,
    "model": functools.partial(MLP, hidden=(64,)),
    "methods": {
        "adamw": Method(Optimizer(optax.adamw), 3e-3),
        "sam": Method(Optimizer(optax.adamw, sam, {"rho": 0.3}), 3e-3),
    },
    "seed": 0,
    "num_seeds": 2,
    "precision": "float32",
    "noise_levels": (0.0, 0.6),
    "only": (),
    "train_examples": 300,
    "steps": 400,
    "batch_size": 50,
    "steps_per_chunk": 200,
    "max_test_examples": 500,
}


def test_wrong_labels_are_the_share_asked_for_and_those_of_the_lower_level():
    task = FromScratch(**SMALL | {"noise_levels": (0.0, 0.3, 0.6), "train_examples": 1000})
    source, images = task._noised, digits().images
    labels = {image.tobytes(): label for image, label in zip(images, digits().labels, strict=True)}
    right = np.array([labels[image.tobytes()] for image in source.dataset.images])
    wrong = (source.dataset.labels != right).reshape(3, 2, 1000)
    np.testing.assert_allclose(wrong.mean((1, 2)), [0, 0.27, 0.54], atol=0.03)
    assert not np.any(wrong[1] & ~wrong[2])
    assert np.any(wrong[2, 0] != wrong[2, 1])  # seeds differ
    batch = source[0]["image"].reshape(3, 2, 50, -1)
    assert not np.array_equal(batch[0, 0], batch[0, 1])


def test_test_examples_have_right_labels_and_are_never_trained_on():
    task = FromScratch(**SMALL)
    images, labels, _, _ = task._held_out
    rows = task._rows["test"][:500]
    known = digits()
    np.testing.assert_array_equal(labels, known.labels[rows])
    trained = {image.tobytes() for image in task._noised.dataset.images}
    assert not any(known.images[row].tobytes() in trained for row in rows)
    assert images.shape == (500, 8, 8, 1)


@pytest.mark.slow
def test_sam_memorises_less(tmp_path):
    """Fails with the attack's sign flipped, with radius 0, and with right labels at every level."""
    task = FromScratch(**SMALL)
    rows, _ = train(task)
    test, given = (plots.curves(rows, task.methods, f"final/{part}", x="noise")
                   for part in ("accuracy", "train"))  # fmt: skip
    for name in task.methods:
        assert np.mean(test[name][0.0]) > np.mean(test[name][0.6]) + 0.05
    assert np.mean(given["adamw"][0.6]) > np.mean(given["sam"][0.6]) + 0.03
    assert np.mean(test["sam"][0.6]) > np.mean(test["adamw"][0.6]) + 0.02

    values, table = task.summarize(rows)
    assert values["sam"]["0.6"]["gain"]["mean"] == pytest.approx(
        np.mean(test["sam"][0.6]) - np.mean(test["adamw"][0.6])
    )
    assert [row[0] for row in table.rows] == ["adamw", "sam"]
    assert table.columns[1:3] == ("noise 0 %", "noise 60 %")
    assert table.columns[3] == "gain over adamw at 60 %, paired"
    task.plot(rows, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"accuracy_by_noise.png", "learning_curves.png"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"train_examples": 10}, "train_examples must be >= batch_size = 50, got 10"),
        ({"noise_levels": (0.0, 1.5)}, r"noise_levels must be in \[0, 1\], at least one, got"),
        ({"noise_levels": ()}, "noise_levels must be in"),
        ({"noise_levels": (0.2, 0.2)}, "noise_levels must differ"),
        ({"only": ["samm"]}, "only must name methods of .*, got 'samm'"),
    ],
)
def test_refused_before_data_is_loaded(changes, words):
    def no_data():
        raise AssertionError("data was loaded")

    with pytest.raises(ValueError, match=words):
        FromScratch(**SMALL | {"data": no_data} | changes).validate()


def test_more_examples_than_there_are():
    with pytest.raises(ValueError, match=r"train_examples must be <= 1078, .* got 2000"):
        FromScratch(**SMALL | {"train_examples": 2000}).stages()


SEARCH = {
    "num_seeds": 1,
    "noise_levels": (0.0,),
    "validation_examples": 200,
    "grid": {"adamw": {"learning_rate": (1e-6, 3e-3)}, "sam": {"learning_rate": (1e-6, 3e-3)}},
}


@pytest.mark.slow
def test_search_takes_its_examples_from_the_training_part():
    task = FromScratch(**SMALL | SEARCH)
    rows, _ = train(task)
    best = task.summarize(rows).values["best"]
    assert [best[name]["learning_rate"] for name in ("adamw", "sam")] == [3e-3, 3e-3]
    assert best["sam"]["rho"] == 0.3
    whole = FromScratch(**SMALL)._rows
    used = np.concatenate([task._rows["train"], task._rows["validation"]])
    np.testing.assert_array_equal(np.sort(used), np.sort(whole["train"]))
    assert len(task._rows["validation"]) == 200


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_levels": (0.0, 0.2)}, "noise_levels must be one in a search, got"),
        ({"validation_examples": 0}, "validation_examples must be >= 1, got 0"),
        ({"validation_examples": None}, "validation_examples must be >= 1, got None"),
        ({"grid": None}, "validation_examples must be null without a grid, got 200"),
    ],
)
def test_search_refuses(changes, words):
    with pytest.raises(ValueError, match=words):
        FromScratch(**SMALL | SEARCH | changes).validate()


def test_search_with_no_training_examples_left():
    with pytest.raises(ValueError, match=r"validation_examples must be < 1078, .* got 1078"):
        FromScratch(**SMALL | SEARCH | {"validation_examples": 1078}).stages()


@pytest.mark.slow
def test_one_noise_level(tmp_path):
    """A table with one column of accuracies, and no plot over noise."""
    task = FromScratch(**SMALL | {"noise_levels": (0.0,), "steps": 50, "steps_per_chunk": 50})
    rows, _ = train(task)
    assert task.summarize(rows).table.columns == ("method", "test", "gain over adamw, paired")
    task.plot(rows, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"learning_curves.png"}
