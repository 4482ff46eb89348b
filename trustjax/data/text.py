"""Documents in memory: folders of plain text, Hugging Face's parquet folders, Python's pages."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trustjax._files import one_line
from trustjax.data._parquet import (
    features,
    find_column,
    read_schema,
    read_table,
    split_files,
    split_name,
    without_dictionary,
)
from trustjax.data.decoding import DataError

_TEXT_NAMES = ("text", "sentence", "content", "document")


class TextDataset(NamedTuple):
    """Documents, and the domain of each.

    Attributes:
      documents: The texts, none of them empty.
      labels: Domains, int32 [n] in 0..len(label_names) - 1.
      label_names: Names of the domains.
      name: Short name for logs.
    """

    documents: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    label_names: tuple[str, ...]
    name: str


def python_topics() -> TextDataset:
    """The pages of Python's `help()` on the language: about 80 documents, 0.5 million characters.

    They come with Python, so nothing is downloaded; their words differ between versions of it. All
    are of one domain.
    """
    from pydoc_data.topics import topics

    names, pages = zip(*sorted(topics.items()), strict=True)
    return TextDataset(pages, np.zeros(len(names), np.int32), ("python",), "python_topics")


def text_folder(path: str | os.PathLike[str], *, encoding: str = "utf-8") -> TextDataset:
    """Plain text by domain.

    A file `DOMAIN.txt` holds documents with blank lines between them; a folder `DOMAIN` holds one
    document per file `*.txt`, at any depth.

    Args:
      path: The folder with these files and folders.
      encoding: Encoding of the files. A byte order mark at their start is not part of the text.

    Returns:
      Documents without blank lines around them, in the order of the names of domains and files.

    Raises:
      DataError: There is no such folder or no text in it, a file is not in the encoding, or a
        document is empty.
      LookupError: There is no such encoding.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"path must be a folder of text files, got {str(path)!r}")
    domains: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            found = [_document(file, encoding) for file in sorted(entry.rglob("*.txt"))]
            domains.setdefault(entry.name, []).extend(found)
        elif entry.suffix == ".txt":
            domains.setdefault(entry.stem, []).extend(_documents(entry, encoding))
    domains = {name: documents for name, documents in sorted(domains.items()) if documents}
    if not domains:
        raise DataError(f"{folder}: no text; expected files DOMAIN.txt or DOMAIN/*.txt")
    labels = np.repeat(np.arange(len(domains)), [len(each) for each in domains.values()])
    documents = tuple(document for each in domains.values() for document in each)
    return TextDataset(documents, labels.astype(np.int32), tuple(domains), folder.resolve().name)


def hugging_face_text(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    text_column: str | None = None,
    label_column: str | None = None,
) -> TextDataset:
    """One split of a text set in Hugging Face's parquet layout.

    Args:
      path: A folder with files `SPLIT-00000-of-0000N.parquet` at any depth, or a hub id
        `owner/name`, which is downloaded once and then read in the same way.
      split: Name of the split to read.
      text_column: Column of strings, one document a row. By default the only column called text,
        sentence, content or document.
      label_column: Column of classes that stand for domains: strings, or integers that the file's
        metadata names. By default all documents are of one domain.

    Returns:
      The documents in the order of the files; domains in the order of the metadata, or else of
      their names.

    Raises:
      DataError: There is no such folder, split or column, or several columns fit; a file cannot be
        read; or a text is null, empty or no string.
      ImportError: A package of the `experiments` extra is missing.
    """
    name = split_name(path, split)
    documents: list[str] = []
    domains: list[str] = []
    known: list[str] = []
    for file in split_files(path, split):
        schema = read_schema(file)
        text = find_column(file, schema, "text_column", text_column, "", _TEXT_NAMES)
        documents.extend(strings(file, text))
        if label_column is None:
            continue
        label = find_column(file, schema, "label_column", label_column, "", ())
        known = features(file, schema)[label].get("names") or known
        domains.extend(_domains(file, label, known))
    if label_column is None:
        return TextDataset(tuple(documents), np.zeros(len(documents), np.int32), (split,), name)
    label_names = tuple(known) or tuple(sorted(set(domains)))
    labels = np.array([label_names.index(domain) for domain in domains], np.int32)
    return TextDataset(tuple(documents), labels, label_names, name)


def strings(file: Path, name: str) -> list[str]:
    """A column of strings that are not empty. Raises DataError, which names file, row, column."""
    from pyarrow import types

    column = without_dictionary(read_table(file, [name]).column(name))
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        raise DataError(f"{file}, column {name!r}: {column.type} is not a string type")
    found: list[str | None] = column.to_pylist()
    return [
        not_empty(f"{file}, row {row}, column {name!r}", text) for row, text in enumerate(found)
    ]


def _domains(file: Path, name: str, known: list[str]) -> Iterator[str]:
    """The names of the classes in a column."""
    column: list[Any] = read_table(file, [name]).column(name).to_pylist()
    for row, value in enumerate(column):
        if isinstance(value, int) and 0 <= value < len(known):
            yield known[value]
        elif isinstance(value, str):
            yield value
        else:
            raise DataError(
                f"{file}, row {row}, column {name!r}: {value!r} is no string and no class that the "
                "file's metadata names"
            )


def not_empty(source: str, text: str | None) -> str:
    """The text. Raises DataError, which names the source, if there is none."""
    if text is None or not text.strip():
        raise DataError(f"{source}: {'null' if text is None else 'an empty document'}")
    return text


def _read(file: Path, encoding: str) -> str:
    try:
        # Text files of some programs begin with a byte order mark, which is not text.
        return file.read_text(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}, line {line}: not {encoding}: byte 0x{error.object[error.start]:02x} at "
            f"position {error.start}"
        ) from error
    except OSError as error:
        raise DataError(f"{file}: {one_line(error)}") from error


def _document(file: Path, encoding: str) -> str:
    return not_empty(str(file), _read(file, encoding)).strip("\n")


def _documents(file: Path, encoding: str) -> Iterator[str]:
    """The parts of a file between blank lines."""
    lines = not_empty(str(file), _read(file, encoding)).splitlines()
    document: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            document.append(line)
        elif document:
            yield "\n".join(document)
            document = []
