import json
import sys

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustjax.data import Batches, ImageDataset, evaluation_batches, iterate


def dataset(n: int = 20) -> ImageDataset:
    """Image i is filled with i, so that an image tells its row; its label is i too."""
    rows = np.arange(n)
    images = np.broadcast_to(rows[:, None, None, None], (n, 3, 2, 1)).astype(np.uint8)
    return ImageDataset(images, rows.astype(np.int32), n, "rows")


def labels(source: Batches, count: int) -> list[list[int]]:
    return [source[index]["label"].tolist() for index in range(count)]


def test_element() -> None:
    data = dataset(256)
    batch = Batches(data, np.arange(256), batch_size=8, seed=0)[3]
    assert batch["image"].shape == (8, 3, 2, 1)
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] * np.float32(255), batch["label"])
    everything = Batches(data, np.arange(256), batch_size=256, seed=0)[0]["image"]
    assert everything.min() == 0
    assert everything.max() == 1


@settings(deadline=None, max_examples=30)
@given(num_rows=st.integers(1, 20), batch_size=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation_without_the_remainder(
    num_rows: int, batch_size: int, seed: int
) -> None:
    rows = np.arange(20)[-num_rows:]
    if batch_size > num_rows:
        with pytest.raises(ValueError, match=f"the number of rows, {num_rows}, got {batch_size}"):
            Batches(dataset(), rows, batch_size=batch_size, seed=seed)
        return
    source = Batches(dataset(), rows, batch_size=batch_size, seed=seed)
    per_epoch = num_rows // batch_size
    assert source.batches_per_epoch == per_epoch
    for epoch in range(3):
        # The documented order, so that a run can be repeated without this class.
        order = np.random.default_rng([seed, 0, epoch]).permutation(rows)
        order = order[: per_epoch * batch_size].reshape(per_epoch, batch_size)
        seen = [source[epoch * per_epoch + batch]["label"] for batch in range(per_epoch)]
        np.testing.assert_array_equal(seen, order)


def test_epochs_and_seeds_differ() -> None:
    source = Batches(dataset(), np.arange(20), batch_size=20, seed=3)
    first, second = labels(source, 2)
    assert first != second
    assert first != labels(Batches(dataset(), np.arange(20), batch_size=20, seed=4), 1)[0]


def test_seed_index_does_not_depend_on_the_number_of_seeds() -> None:
    rows = np.stack([np.arange(10), np.arange(10, 20), np.arange(5, 15)])
    three = Batches(dataset(), rows, batch_size=4, seed=1)
    two = Batches(dataset(), rows[:2], batch_size=4, seed=1)
    one = Batches(dataset(), rows[0], batch_size=4, seed=1)
    for index in range(5):
        batch = three[index]
        assert batch["image"].shape == (3, 4, 3, 2, 1)
        assert batch["label"].shape == (3, 4)
        np.testing.assert_array_equal(batch["label"][:2], two[index]["label"])
        np.testing.assert_array_equal(batch["image"][0], one[index]["image"])
        assert set(batch["label"][1].tolist()) <= set(range(10, 20))
    same_rows = Batches(dataset(), [np.arange(20)] * 2, batch_size=20, seed=1)[0]["label"]
    assert not np.array_equal(*same_rows)


def test_random_access_in_any_order() -> None:
    source = Batches(dataset(), np.arange(20), batch_size=6, seed=0)
    forward = labels(source, 9)
    backward = [source[np.int64(index)]["label"].tolist() for index in reversed(range(9))]
    assert forward == backward[::-1]
    assert source[10**12]["label"].shape == (6,)


def test_is_an_endless_grain_source() -> None:
    source = Batches(dataset(), np.arange(20), batch_size=6, seed=0)
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    assert len(source) == sys.maxsize
    with pytest.raises(IndexError, match="-1"):
        source[-1]


def test_resume_in_the_middle_of_an_epoch() -> None:
    def new() -> grain.DatasetIterator:
        return iterate(Batches(dataset(), np.arange(20), batch_size=6, seed=0))

    iterator = new()
    before = [next(iterator)["label"].tolist() for _ in range(5)]  # 3 batches an epoch
    state = json.dumps(iterator.get_state())
    after = [next(iterator)["label"].tolist() for _ in range(6)]
    assert before + after == labels(Batches(dataset(), np.arange(20), batch_size=6, seed=0), 11)

    resumed = new()
    resumed.set_state(json.loads(state))
    assert [next(resumed)["label"].tolist() for _ in range(6)] == after
    iterator.set_state(json.loads(state))  # also with batches prepared ahead
    assert [next(iterator)["label"].tolist() for _ in range(6)] == after


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows must be integers of rank 1 or 2"),
        ([0.0, 1.0], "float64"),
        ([True, False], "bool"),
        (3, "rank 1 or 2"),
        ([[[0]]], "rank 1 or 2"),
        ([0, 20], r"0\.\.19, got 0\.\.20"),
        ([-1, 2], r"0\.\.19, got -1\.\.2"),
    ],
)
def test_wrong_rows(rows: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(dataset(), rows, batch_size=1, seed=0)  # type: ignore[arg-type]


def test_wrong_numbers() -> None:
    with pytest.raises(ValueError, match="batch_size must be from 1 to the number of rows, 3, got"):
        Batches(dataset(), [1, 2, 3], batch_size=0, seed=0)
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        Batches(dataset(), [1, 2, 3], batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        evaluation_batches(dataset(), [1, 2, 3], 0)
    with pytest.raises(ValueError, match="rank 1"):
        evaluation_batches(dataset(), [[1, 2, 3]], 1)


@settings(deadline=None, max_examples=30)
@given(num_rows=st.integers(1, 20), batch_size=st.integers(1, 30))
def test_evaluation_sees_every_row_once(num_rows: int, batch_size: int) -> None:
    rows = np.random.default_rng(num_rows).permutation(20)[:num_rows]
    batches = evaluation_batches(dataset(), rows, batch_size)
    num_batches = -(-num_rows // batch_size)
    assert batches["image"].shape == (num_batches, batch_size, 3, 2, 1)
    assert batches["image"].dtype == np.float32
    assert batches["label"].shape == batches["where"].shape == (num_batches, batch_size)
    assert batches["where"].dtype == bool
    np.testing.assert_array_equal(batches["label"][batches["where"]], rows)
    np.testing.assert_array_equal(np.rint(batches["image"][..., 0, 0, 0] * 255), batches["label"])
