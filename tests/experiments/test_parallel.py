"""The adaptation experiment with every batch split over eight simulated devices."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hydra import compose, initialize_config_dir
from test_adaptation import METHODS, SMALL

from experiments.runtime import loop
from experiments.runtime.building import build
from experiments.runtime.checkpoint import Checkpoints
from experiments.runtime.config import CONF, save_config, to_plain
from experiments.runtime.overrides import resumed_config
from experiments.runtime.targets import ConfigError
from experiments.tasks.adaptation import Adaptation
from experiments.trackers import Csv, read_rows
from trustjax.parallel import make_mesh


def waves(key, shape, dtype):
    """Initial weights without random numbers, which take seconds to compile in float64."""
    return jnp.sin(jnp.arange(np.prod(shape), dtype=dtype)).reshape(shape) / np.sqrt(shape[0])


class DoubleMLP(nn.Module):
    """An MLP with dropout, with parameters and logits in the precision of the computation."""

    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, images, train=False, return_features=False):
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            param_dtype=self.dtype,
            kernel_init=waves,
        )
        x = nn.tanh(dense(16)(images.reshape(len(images), -1)))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        logits = dense(self.num_classes)(x)
        return (logits, x) if return_features else logits


SHORT = SMALL | {
    "model": DoubleMLP,
    "methods": {"tram": METHODS["tram"]},  # pre-training is AdamW
    "precision": "float64",
    "unseen": ("contrast:3",),
    "pretrain_steps": 6,
    "finetune_steps": 6,
    "steps_per_chunk": 3,
}


@pytest.fixture(scope="module", autouse=True)
def everywhere_x64():
    """Double precision in all threads: stages are compiled in one of their own."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def stages():
    """The stages by number of devices; each is compiled once."""
    made = {}
    for num_devices in (1, 8):
        task = Adaptation(**SHORT, mesh=make_mesh(num_devices))
        task.validate()
        made[num_devices] = [stage.compiled() for stage in task.stages()]
        for stage in made[num_devices]:
            stage.measure = stage.evaluate  # quicker to compile
    return made


@pytest.fixture(scope="module")
def trained(stages):
    """The final states of the stages and the rows, by number of devices."""
    results = {}
    for num_devices, some_stages in stages.items():
        final, rows = {}, []
        for stage in some_stages:
            state, batches = stage.init(final), stage.batches()
            for step in range(0, stage.num_steps, stage.steps_per_chunk):
                state, new = stage.advance(state, batches, step, stage.steps_per_chunk)
                rows += new
            final[stage.name] = state
        results[num_devices] = final, rows
    return results


def assert_trees_close(actual, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    jax.tree.map(close, actual, expected)


def test_eight_devices_do_what_one_does(trained):
    (expected, expected_rows), (actual, rows) = trained[1], trained[8]
    assert_trees_close(actual, expected)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-9)
    assert np.all(optax.tree.get(actual["tram"].opt_state, "radius") > 0)  # there is an attack
    for leaf in jax.tree.leaves(actual):
        assert leaf.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8


def test_examples_and_parameters_stay_where_they_are(stages, trained):
    """Only sums cross between devices: of losses, gradients, norms, divergences."""
    for stage in stages[8]:
        program = stage.program
        _, state, _, batches = program.input_shardings[0]  # the first are frozen parameters
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
        assert {name: leaf.spec for name, leaf in batches.items()} == dict.fromkeys(
            ("image", "label"), jax.P(None, None, ("data",))
        )
        collectives = re.findall(
            r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", program.as_text()
        )
        assert set(collectives) == {"all-reduce"}


def test_a_run_goes_on_with_other_devices(stages, trained, tmp_path):
    """From one device to eight within pre-training, and back within fine-tuning."""
    metrics = tmp_path / "metrics.csv"

    def train(num_devices, *, stop_in=None):
        """Starts or resumes the run; whether it is done."""
        pretraining, tram = stages[num_devices]
        planned = loop.plan([pretraining, tram], lambda name: Checkpoints(tmp_path / name, 1))
        done = loop.train(
            planned,
            metrics,
            [Csv(metrics)],
            every=1000,
            should_stop=lambda: stop_in in [row["stage"] for row in read_rows(metrics)],
        )
        steps = [checkpoints.latest().step for _, checkpoints, _ in planned]
        for _, checkpoints, _ in planned:
            checkpoints.close()
        return done, steps

    assert train(1, stop_in="pretrain") == (False, [3, 0])
    assert train(8, stop_in="tram") == (False, [6, 3])
    assert train(1) == (True, [6, 6])
    checkpoints = Checkpoints(tmp_path / "tram", 1)
    for final, _ in trained.values():
        restored = checkpoints.restore(loop._abstract(final["tram"]))
        assert_trees_close(restored, final["tram"])
        placed = lambda leaf: leaf.sharding
        assert jax.tree.map(placed, restored) == jax.tree.map(placed, final["tram"])
    checkpoints.close()


# ---- the configuration


def test_mesh_is_a_choice_and_may_change_on_resume(tmp_path):
    def composed(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", ["+exp=tram_vision", *overrides])
        return to_plain(config.task)

    size = lambda task: build(task["mesh"], "task.mesh").size
    assert size(composed()) == 1
    assert size(composed("mesh=data")) == 8
    save_config({"task": composed()}, tmp_path / "config.yaml")
    assert size(resumed_config(tmp_path, ["mesh=data"])["task"]) == 8
    fewer = resumed_config(tmp_path, ["mesh=data", "mesh.num_devices=4"])["task"]
    assert size(fewer) == 4
    with pytest.raises(ConfigError, match=r"mesh\.num_devices must be from 1 to 8, .*got 9"):
        size(resumed_config(tmp_path, ["mesh.num_devices=9"])["task"])


def test_batches_that_cannot_be_shared_equally():
    def no_data():
        raise AssertionError("data was loaded")

    task = Adaptation(**SHORT | {"data": no_data, "batch_size": 60}, mesh=make_mesh())
    message = "batch_size must be a multiple of the number of devices, 8, got 60"
    with pytest.raises(ValueError, match=message):
        task.validate()
