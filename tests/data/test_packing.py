import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustjax.data import Batches, iterate, pack

DOCUMENTS = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13]]


def test_rows() -> None:
    packed = pack(DOCUMENTS, 5)
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5], [9, 10, 11, 5, 6], [7, 8, 12, 13, 0]]
    assert packed.segments.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 2, 2], [1, 1, 2, 2, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 0, 1, 0]]


@settings(deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(2, 12))
def test_every_token_is_predicted_once_from_its_own_document(sizes: list[int], length: int) -> None:
    ends = np.cumsum(sizes)
    documents = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    packed = pack(documents, length)
    batch = packed.batch(np.arange(packed.num_examples))
    mask = batch["mask"]
    np.testing.assert_array_equal(batch["targets"][mask], batch["tokens"][mask] + 1)
    expected = sorted(token for document in documents for token in document[1:])
    assert sorted(batch["targets"][mask]) == expected
    # A document that fits into a row stays whole.
    for document in documents:
        if len(document) <= length:
            assert np.sum(packed.tokens == document[0]) >= 1
            row, start = np.argwhere((packed.tokens == document[0]) & (packed.segments > 0))[0]
            found = packed.tokens[row, start : start + len(document)]
            np.testing.assert_array_equal(found, document)


def test_fuller_than_in_order() -> None:
    sizes = np.random.default_rng(0).integers(2, 200, 300)
    packed = pack([np.ones(size, int) for size in sizes], 256)
    assert np.mean(packed.segments > 0) > 0.97


def test_batches_resume() -> None:
    packed = pack(DOCUMENTS, 5)
    source = Batches(packed, np.arange(3), batch_size=2, seed=1)
    iterator = iterate(source)
    first = next(iterator)
    assert first["tokens"].shape == (2, 5)
    state = iterator.get_state()
    second = next(iterator)
    again = iterate(source)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["targets"], second["targets"])
    both = Batches(packed, [[0, 1], [1, 2]], batch_size=1, seed=0)[0]
    assert both["mask"].shape == (2, 1, 5)


@pytest.mark.parametrize(
    ("documents", "length", "text"),
    [
        ([[1, 2]], 1, "length must be >= 2, got 1"),
        ([], 4, "documents must hold at least one document"),
        ([[1, 2], [3]], 4, r"documents\[1\] must be at least two tokens, each >= 0, got \[3\]"),
        ([[1, -2]], 4, r"documents\[0\] must be at least two tokens"),
    ],
)
def test_errors(documents: list[list[int]], length: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pack(documents, length)
