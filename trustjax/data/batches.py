"""Batches of an image dataset: endless shuffled ones for training, padded ones for evaluation."""

import functools
import operator
import sys
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError
from trustjax._files import experiments_extra
from trustjax.data.images import ImageDataset, unit_range

if TYPE_CHECKING:
    import grain

Batch = dict[str, npt.NDArray[Any]]


class Batches:
    """A Grain data source (RandomAccessDataSource) whose element i is the i-th training batch.

    Whole batches, because Grain spends about 60 us on an element, as much as on a batch here.
    Every epoch draws a fresh permutation of the rows from `default_rng([seed, s, epoch])` for seed
    index s, and drops what does not fill a batch. So the order of a seed index does not depend on
    how many there are, and any batch can be computed without those before it.

    Element: {"image": float32 [(num_seeds,) batch_size, height, width, channels] in [0, 1],
    "label": int32 [(num_seeds,) batch_size]}. The stream has no end: the length is sys.maxsize.

    Args:
      dataset: the images and labels.
      rows: int [num_rows], rows of the dataset to draw from, or [num_seeds, num_rows] for one
        such list for each of several runs trained at once, each in its own order.
      batch_size: 1..num_rows.
      seed: int >= 0.

    Raises:
      ValueError: rows, batch_size or seed are not as above.
    """

    def __init__(
        self, dataset: ImageDataset, rows: npt.ArrayLike, *, batch_size: int, seed: int
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
        # Consecutive batches share an epoch; its permutation is worth keeping.
        self._epoch_rows = functools.lru_cache(maxsize=1)(self._shuffled_rows)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> Batch:
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"batch index must be >= 0, got {index}")
        epoch, batch = divmod(index, self.batches_per_epoch)
        start = batch * self.batch_size
        return _batch(self.dataset, self._epoch_rows(epoch)[..., start : start + self.batch_size])

    def _shuffled_rows(self, epoch: int) -> npt.NDArray[np.int64]:
        """The rows in the order of one epoch, of the shape of `rows`."""
        shuffled = [
            np.random.default_rng([self.seed, seed_index, epoch]).permutation(rows)
            for seed_index, rows in enumerate(np.atleast_2d(self.rows))
        ]
        return np.reshape(shuffled, self.rows.shape)


def iterate(source: Batches) -> "grain.DatasetIterator[Batch]":
    """Iterates over the batches from the first one, preparing two ahead in a thread.

    `get_state()` is a small JSON-able dict, the number of batches handed out; after
    `set_state(state)` on a new iterator of an equal source the same batches follow. Raises
    ImportError without Grain.
    """
    with experiments_extra():
        import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def evaluation_batches(dataset: ImageDataset, rows: npt.ArrayLike, batch_size: int) -> Batch:
    """All given rows once, in order, stacked to batches of one size for a scan.

    Args:
      dataset: the images and labels.
      rows: int [num_rows].
      batch_size: at least 1.

    Returns:
      {"image": float32 [num_batches, batch_size, height, width, channels] in [0, 1], "label":
      int32 [num_batches, batch_size], "where": bool [num_batches, batch_size]}. `where` is False
      on the examples (the first rows again) that only fill the last batch.

    Raises:
      ValueError: rows or batch_size are not as above.
    """
    rows = _checked_rows(dataset, rows, ranks=(1,))
    if batch_size < 1:
        raise FieldError("batch_size", "be >= 1", batch_size)
    shape = (-(-len(rows) // batch_size), batch_size)
    where = np.arange(shape[0] * batch_size).reshape(shape) < len(rows)
    return _batch(dataset, np.resize(rows, shape)) | {"where": where}


def _batch(dataset: ImageDataset, rows: npt.NDArray[np.int64]) -> Batch:
    return {"image": unit_range(dataset.images[rows]), "label": dataset.labels[rows]}


def _checked_rows(
    dataset: ImageDataset, rows: npt.ArrayLike, *, ranks: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    rows = np.asarray(rows)
    if rows.ndim not in ranks or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer):
        raise FieldError(
            "rows",
            f"be integers of rank {' or '.join(map(str, ranks))}, at least one",
            f"{rows.dtype} of shape {rows.shape}",
        )
    if rows.min() < 0 or rows.max() >= len(dataset.labels):
        raise FieldError(
            "rows", f"be in 0..{len(dataset.labels) - 1}", f"{rows.min()}..{rows.max()}"
        )
    return rows.astype(np.int64)
