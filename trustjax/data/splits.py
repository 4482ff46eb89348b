"""Random disjoint parts of a dataset, with the same share of every class."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError


class Labelled(Protocol):
    """A dataset whose examples have classes, such as images, or documents of several domains."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """The class of every example, int32 [n]."""


def split(
    dataset: Labelled, fractions: Mapping[str, float], *, seed: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Disjoint random parts of a dataset, each with the same share of every class.

    A part of fraction f has f n of all n rows, rounded, and about f m of a class with m examples.

    Args:
      dataset: The images or documents to split; documents are not cut.
      fractions: Fraction of every part by name, each above 0, together at most 1. The rest of the
        rows is in no part.
      seed: Seed of the split, int >= 0; the same seed gives the same parts.

    Returns:
      The rows of every part by name, int64 [rows of the part], ascending.

    Raises:
      ValueError: The fractions are out of range, or a part has no rows.
    """
    if not fractions or not all(fraction > 0 for fraction in fractions.values()):
        raise FieldError("fractions", "be above 0", dict(fractions))
    bounds = np.cumsum([0.0, *fractions.values()])
    if bounds[-1] > 1 + 1e-9:
        raise FieldError("fractions", "add up to at most 1", dict(fractions))

    # Place the shuffled examples of each class evenly on the line from 0 to 1, from a random start.
    # An interval of that line then has the same share of every class.
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(dataset.labels))
    position = np.empty(len(shuffled))
    for label in np.unique(dataset.labels):
        of_class = np.flatnonzero(dataset.labels[shuffled] == label)
        position[of_class] = (np.arange(len(of_class)) + random.random()) / len(of_class)
    line = shuffled[np.argsort(position, kind="stable")]

    ends = np.rint(bounds * len(line)).astype(np.int64)
    parts = {
        name: np.sort(line[start:stop])
        for name, start, stop in zip(fractions, ends[:-1], ends[1:], strict=True)
    }
    for name, rows in parts.items():
        if len(rows) == 0:
            raise ValueError(
                f"fractions[{name!r}] = {fractions[name]} of {len(line)} rows leaves no row"
            )
    return parts
