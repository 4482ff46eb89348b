"""Rows of equal length that several documents share, with masks that keep them apart."""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError, check_count


class PackedTokens(NamedTuple):
    """Documents of tokens, packed into rows.

    Attributes:
      tokens: Tokens, int32 [rows, length]; 0 as padding.
      segments: Number of the document within its row, from 1, int32 [rows, length]; 0 for padding.
        A token attends to earlier tokens of the same number.
      positions: Position of the token in its piece of a document, int32 [rows, length].
    """

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]

    @property
    def num_examples(self) -> int:
        """How many rows there are."""
        return len(self.tokens)

    def batch(self, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """The rows for a training step of next-token prediction.

        Args:
          rows: Rows, int64 [...].

        Returns:
          Arrays [..., length]: "tokens", "segments" and "positions" as above; "targets", the next
          token; and "mask", bool, whether there is a next token in the same document.
        """
        tokens, segments = self.tokens[rows], self.segments[rows]
        following = np.roll(segments, -1, -1)
        following[..., -1] = 0
        return {
            "tokens": tokens,
            "segments": segments,
            "positions": self.positions[rows],
            "targets": np.roll(tokens, -1, -1),
            "mask": (segments == following) & (segments > 0),
        }


def pack(documents: Sequence[Sequence[int]], length: int) -> PackedTokens:
    """Packs documents into rows, every one into the fullest row that has room for it.

    A document that is longer than a row is cut into pieces, each of which begins with the last
    token of the one before, so that every token but the first is predicted exactly once. Shorter
    documents stay whole.

    Args:
      documents: Tokens of every document, at least two, such as a first token and a text.
      length: Tokens of a row, >= 2.

    Returns:
      The rows, with the longest documents first.

    Raises:
      ValueError: `length` is less than 2, or a document has fewer than two tokens or a negative
        one.

    Source: best-fit packing, Ding et al., arXiv:2404.10830.

    >>> packed = pack([[1, 2, 3], [4, 5], [6, 7]], 5)
    >>> print(packed.tokens, packed.segments, sep="\\n")
    [[1 2 3 4 5]
     [6 7 0 0 0]]
    [[1 1 1 2 2]
     [1 1 0 0 0]]
    """
    check_count("length", length, at_least=2)
    if len(documents) == 0:
        raise FieldError("documents", "hold at least one document", "none")
    pieces: list[npt.NDArray[np.int32]] = []
    for number, document in enumerate(documents):
        whole = np.asarray(document, np.int32)
        if whole.ndim != 1 or len(whole) < 2 or whole.min() < 0:
            raise FieldError(
                f"documents[{number}]", "be at least two tokens, each >= 0", list(document)
            )
        starts = range(0, len(whole) - 1, length - 1)
        pieces.extend(whole[start : start + length] for start in starts)

    rows: list[list[npt.NDArray[np.int32]]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of every row, in ascending order
    for piece in sorted(pieces, key=len, reverse=True):
        place = bisect.bisect_left(room, (len(piece), -1))
        if place == len(room):
            room.append((length, len(rows)))
            rows.append([])
        free, row = room.pop(place)
        rows[row].append(piece)
        bisect.insort(room, (free - len(piece), row))

    tokens, segments, positions = np.zeros((3, len(rows), length), np.int32)
    for row, parts in enumerate(rows):
        start = 0
        for segment, part in enumerate(parts, 1):
            end = start + len(part)
            tokens[row, start:end] = part
            segments[row, start:end] = segment
            positions[row, start:end] = np.arange(len(part))
            start = end
    return PackedTokens(tokens, segments, positions)
