"""Checkpoints on disk."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.runtime.checkpoint import CheckpointMetadata, Checkpoints
from experiments.runtime.files import SaveError

METADATA = CheckpointMetadata(10, 3, 1.5, True, {"pretrain": 100}, {"next": [1, {"a": None}]})


def trained_state(scale: float = 1.0) -> dict[str, Any]:
    """Everything a state may hold: an optimizer's NamedTuples, several dtypes, keys, None."""
    params = {"w": scale * jnp.arange(4.0), "b": jnp.ones((2, 2), jnp.bfloat16)}
    mask = {"w": True, "b": False}
    tx = optax.chain(optax.clip(1.0), optax.masked(optax.adam(0.1), mask), optax.sgd(0.1, 0.9))
    _, optimizer = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    raw, typed = jax.random.PRNGKey(3), jax.random.key(3)
    return {"params": params, "optimizer": optimizer, "raw": raw, "typed": typed, "none": None}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    opened = Checkpoints(tmp_path / "sam", keep=2)
    yield opened
    opened.close()


def assert_same(state: Any, other: Any) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert leaf.dtype == expected.dtype
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, expected = jax.random.key_data(leaf), jax.random.key_data(expected)
        np.testing.assert_array_equal(leaf, expected)


def test_round_trip(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints.latest() == CheckpointMetadata()
    checkpoints.save(trained_state(), METADATA)
    again = Checkpoints(tmp_path / "sam", keep=2)
    assert again.latest() == METADATA
    assert_same(again.restore(trained_state(scale=0.0)), trained_state())
    again.close()


def test_newest_are_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoints.save({"x": jnp.float32(step)}, METADATA._replace(step=step))
    assert sorted(path.name for path in (tmp_path / "sam").iterdir()) == ["20", "30"]
    assert checkpoints.restore({"x": jnp.float32(0)})["x"] == 30


def test_placement_follows_like(checkpoints: Checkpoints) -> None:
    def place(size: int) -> jax.Array:
        mesh = jax.make_mesh((size,), ("data",), devices=jax.devices()[:size])
        return jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))

    checkpoints.save({"x": place(4)}, METADATA)
    restored = checkpoints.restore({"x": place(8)})["x"]
    assert restored.sharding == place(8).sharding
    np.testing.assert_array_equal(restored, np.arange(8.0))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"x": jnp.zeros((2, 4))}, r"x is float32\[2, 3\] in it and float32\[2, 4\] here"),
        ({"x": jnp.zeros((2, 3), int)}, r"x is float32\[2, 3\] in it and int32\[2, 3\] here"),
        ({"x": jnp.zeros((2, 3)), "y": [jnp.zeros(1)]}, "it has no y.0"),
        ({}, "it also has x"),
    ],
)
def test_a_state_of_another_shape_dtype_or_structure(
    like: Any, message: str, checkpoints: Checkpoints, tmp_path: Path, capfd: Any
) -> None:
    """Orbax itself would cast the dtype, and print a page for a shape, or crash."""
    checkpoints.save({"x": jnp.zeros((2, 3))}, METADATA)
    with pytest.raises(SaveError, match=rf"10 does not fit this run: {message}$"):
        checkpoints.restore(like)
    assert capfd.readouterr() == ("", "")


def test_unfinished_and_half_deleted_are_ignored(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoints.save({"x": jnp.float32(step)}, METADATA._replace(step=step))
    unfinished = tmp_path / "sam" / "30.orbax-checkpoint-tmp-123"
    unfinished.mkdir()
    (tmp_path / "sam" / "10" / "_CHECKPOINT_METADATA").unlink()
    again = Checkpoints(tmp_path / "sam", keep=2)
    assert again.latest().step == 20
    assert again.restore({"x": jnp.float32(0)})["x"] == 20
    again.save({"x": jnp.float32(30)}, METADATA._replace(step=30))
    assert sorted(path.name for path in (tmp_path / "sam").iterdir()) == ["20", "30"]
    again.close()


def test_a_killed_save_is_repeated_in_silence(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(absl.logging, "warning", lambda text, *rest: warnings.append(text % rest))
    left = tmp_path / "sam" / "10.new.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "part").write_text("cut")
    checkpoints.save(trained_state(), METADATA)
    assert [path.name for path in (tmp_path / "sam").iterdir()] == ["10"]
    assert warnings == []


def test_what_a_failed_save_leaves_may_stay(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "sam" / "10.new.part").write_text("")
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SaveError, match=r"^cannot save step 10 in .*there is no earlier one"):
        checkpoints.save(trained_state(), METADATA)


def test_failed_save_leaves_the_older_one_whole(checkpoints: Checkpoints, tmp_path: Path) -> None:
    small = {"x": jnp.zeros(10)}
    checkpoints.save(small, METADATA)
    noise = jax.random.normal(jax.random.key(0), (10**6,))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # like a disk that is full
    try:
        with pytest.raises(SaveError, match=r"cannot save step 20 in .*sam \(step 10 is whole\): "):
            checkpoints.save({"x": noise}, METADATA._replace(step=20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path / "sam", keep=2)
    assert again.latest() == METADATA
    assert_same(again.restore(small), small)
    again.close()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "sam").write_text("a file in its place")
    with pytest.raises(SaveError, match=str(tmp_path / "sam")):
        Checkpoints(tmp_path / "sam", keep=2)
