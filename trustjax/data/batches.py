"""Batches of a dataset: shuffled and endless for training, padded for evaluation."""

import functools
import operator
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError
from trustjax._files import experiments_extra

if TYPE_CHECKING:
    import grain

Batch = dict[str, npt.NDArray[Any]]


class Dataset(Protocol):
    """Examples in memory, such as `ImageDataset` and `PackedTokens`."""

    @property
    def num_examples(self) -> int:
        """How many examples there are."""

    def batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """The examples of the rows, int64 [...]: arrays that begin with the axes of `rows`."""


DatasetT = TypeVar("DatasetT", bound=Dataset)


class Batches(Generic[DatasetT]):
    """A Grain data source (RandomAccessDataSource) whose element i is the i-th training batch.

    Elements are whole batches because Grain spends about 60 us on an element, as long as a batch
    takes here. Every epoch permutes the rows of seed index s by `default_rng([seed, s, epoch])`,
    and drops the rows that do not fill a batch. So the order of a seed index does not depend on the
    number of seeds, and any batch can be computed without the batches before it.

    An element has arrays [(num_seeds,) batch_size, ...]: of images {"image": float32 [..., height,
    width, channels] in [0, 1], "label": int32 [...]}, of tokens what `PackedTokens.batch` says.
    There is no last batch: the length is sys.maxsize.

    Args:
      dataset: Images or packed tokens.
      rows: Rows of the dataset to draw from, int [num_rows]; or int [num_seeds, num_rows], rows
        for each of several seeds that are trained together, each in its own order.
      batch_size: Number of examples in a batch, from 1 to num_rows.
      seed: Seed of the order, int >= 0.

    Raises:
      ValueError: `rows`, `batch_size` or `seed` is out of range.
    """

    def __init__(
        self, dataset: DatasetT, rows: npt.ArrayLike, *, batch_size: int, seed: int
    ) -> None:
        self.dataset = dataset
        self.rows = _checked_rows(dataset, rows, ranks=(1, 2))
        self.batch_size = batch_size
        self.seed = seed
        if not 1 <= batch_size <= self.rows.shape[-1]:
            raise FieldError(
                "batch_size", f"be from 1 to the number of rows, {self.rows.shape[-1]}", batch_size
            )
        if seed < 0:
            raise FieldError("seed", "be >= 0", seed)
        self.batches_per_epoch = self.rows.shape[-1] // batch_size
        # Consecutive batches share an epoch, so its permutation is kept.
        self._epoch_rows = functools.lru_cache(maxsize=1)(self._shuffled_rows)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> Batch:
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"batch index must be >= 0, got {index}")
        epoch, batch = divmod(index, self.batches_per_epoch)
        start = batch * self.batch_size
        return self.dataset.batch(self._epoch_rows(epoch)[..., start : start + self.batch_size])

    def _shuffled_rows(self, epoch: int) -> npt.NDArray[np.int64]:
        """The rows in the order of one epoch, of the shape of `rows`."""
        shuffled = [
            np.random.default_rng([self.seed, seed_index, epoch]).permutation(rows)
            for seed_index, rows in enumerate(np.atleast_2d(self.rows))
        ]
        return np.reshape(shuffled, self.rows.shape)


def iterate(source: Batches[Any]) -> "grain.DatasetIterator[Batch]":
    """An iterator over the batches from the first one, which prepares two ahead in a thread.

    `get_state()` returns the number of batches so far in a dict for JSON. After `set_state(state)`,
    a new iterator over an equal source gives the batches that follow. Raises ImportError without
    Grain.
    """
    with experiments_extra():
        import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def stacked(batches: Iterator[Batch], count: int) -> Batch:
    """The next `count` batches as arrays with a leading axis of batches, for a scan."""
    chunk = [next(batches) for _ in range(count)]
    return {name: np.stack([batch[name] for batch in chunk]) for name in chunk[0]}


def evaluation_batches(dataset: Dataset, rows: npt.ArrayLike, batch_size: int) -> Batch:
    """All given rows once and in order, as batches of one size for a scan.

    Args:
      dataset: Images or packed tokens.
      rows: Rows of the dataset, int [num_rows].
      batch_size: Number of examples in a batch, at least 1.

    Returns:
      Arrays [num_batches, batch_size, ...] as in `Batches`, and "where", bool [num_batches,
      batch_size]. The first rows again fill up the last batch, and `where` is False on them.

    Raises:
      ValueError: `rows` or `batch_size` is out of range.
    """
    rows = _checked_rows(dataset, rows, ranks=(1,))
    if batch_size < 1:
        raise FieldError("batch_size", "be >= 1", batch_size)
    shape = (-(-len(rows) // batch_size), batch_size)  # the quotient is rounded up
    where = np.arange(shape[0] * batch_size).reshape(shape) < len(rows)
    return dataset.batch(np.resize(rows, shape)) | {"where": where}


def _checked_rows(
    dataset: Dataset, rows: npt.ArrayLike, *, ranks: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    rows = np.asarray(rows)
    if rows.ndim not in ranks or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer):
        raise FieldError(
            "rows",
            f"be integers of rank {' or '.join(map(str, ranks))}, at least one",
            f"{rows.dtype} of shape {rows.shape}",
        )
    if rows.min() < 0 or rows.max() >= dataset.num_examples:
        raise FieldError(
            "rows", f"be in 0..{dataset.num_examples - 1}", f"{rows.min()}..{rows.max()}"
        )
    return rows.astype(np.int64)
