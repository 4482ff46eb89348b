"""Text by genre: the Brown corpus, any folder of genres, or Python's own pages without either."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trustjax._checks import FieldError
from trustjax.data import TextDataset, text_folder

_PYTHON_PAGES = 9  # those that are long enough
_FEW_WORDS = 8  # a paragraph of fewer words is a heading


class Domains(NamedTuple):
    """Documents by genre, and what the genres are for.

    Attributes:
      text: The documents.
      source: Genres to pre-train on.
      target: Genres to fine-tune on.
      unseen: Genres that are only tested on.
    """

    text: TextDataset
    source: tuple[str, ...]
    target: tuple[str, ...]
    unseen: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Genres:
    """A folder of genres, or Python's help() where there is none.

    Attributes:
      path: What `read` gets; None for the folder `folder` in the one that the environment variable
        TRUSTJAX_DATA names. Where there is no such folder, the genres are Python's longest pages,
        the first half of them the source if there is to be one, and the next one the target.
      folder: Name of that folder.
      read: Function of `path` that reads the documents, such as `trustjax.data.text_folder`.
      source: Genres to pre-train on; none for no pre-training.
      target: Genres to fine-tune on; all others if none are named.
      unseen: Genres that are only tested on; None for all others.
    """

    path: str | None = None
    folder: str = "brown"
    read: Callable[[str], TextDataset] = text_folder
    source: Sequence[str] = ()
    target: Sequence[str] = ()
    unseen: Sequence[str] | None = None

    def load(self) -> Domains:
        """The documents. Raises DataError for files that cannot be read, FieldError for genres."""
        path = self.path
        if path is None:
            path = str(Path(os.environ.get("TRUSTJAX_DATA", "")) / self.folder)
            if "TRUSTJAX_DATA" not in os.environ or not Path(path).is_dir():
                return self._without_files()
        text = self.read(path)
        known = text.label_names
        for name in ("source", "target", "unseen"):
            if wrong := [genre for genre in getattr(self, name) or () if genre not in known]:
                raise FieldError(name, f"name genres of {sorted(known)}", repr(wrong[0]))
        source = tuple(self.source)
        target = tuple(self.target) or _others(known, source)
        unseen = _others(known, (*source, *target)) if self.unseen is None else self.unseen
        if shared := {*source} & {*target} | {*unseen} & {*source, *target}:
            raise FieldError("target", "share no genre with source and unseen", sorted(shared))
        return Domains(text, source, target, tuple(unseen))

    def _without_files(self) -> Domains:
        text = python_genres()
        print(
            f"no folder {self.folder} in TRUSTJAX_DATA: the genres are pages of Python's help(), "
            + ", ".join(text.label_names)
        )
        names = text.label_names
        source = names[: len(names) // 2] if self.source else ()
        others = _others(names, source)
        target = others[:1] if self.target else others
        return Domains(text, source, target, _others(others, target))


def _others(known: Sequence[str], used: Sequence[str]) -> tuple[str, ...]:
    return tuple(genre for genre in known if genre not in used)


def python_genres() -> TextDataset:
    """Python's longest pages on the language, each a genre whose documents are its paragraphs.

    A paragraph that stands in several pages belongs to the longest of them; a page with nothing of
    its own is left out.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    genres: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda name: -len(topics[name]))[:_PYTHON_PAGES]:
        paragraphs = dict.fromkeys(" ".join(part.split()) for part in topics[name].split("\n\n"))
        new = [p for p in paragraphs if p not in seen and len(p.split()) >= _FEW_WORDS]
        seen.update(new)
        if new:
            genres[name] = new
    labels = np.repeat(np.arange(len(genres)), [len(genre) for genre in genres.values()])
    documents = tuple(document for genre in genres.values() for document in genre)
    return TextDataset(documents, labels.astype(np.int32), tuple(genres), "python_genres")
