"""Hugging Face's parquet folders: the files of a split, the columns that are meant, their rows."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trustjax._files import experiments_extra, local_folder, one_line
from trustjax.data.decoding import DataError

_SHARD = re.compile(r"(?P<split>.+?)(-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?)?\.parquet")


def split_files(path: str | os.PathLike[str], split: str) -> list[Path]:
    """All shards of a split, in order, or the one file that is called after it.

    `path` is a folder, or a hub id, which is downloaded once.
    """
    folder = local_folder(
        "path", path, DataError, "dataset", repo_type="dataset", allow_patterns="*.parquet"
    )
    shards = [
        (file, match)
        for file in folder.rglob("*.parquet")
        if (match := _SHARD.fullmatch(file.name))
    ]
    found = sorted((file, match) for file, match in shards if match["split"] == split)
    if not found:
        splits = sorted({match["split"] for _, match in shards})
        raise DataError(
            f"{folder}: no split {split!r}; splits found: {', '.join(splits) or 'none'} "
            "(files named SPLIT-00000-of-0000N.parquet or SPLIT.parquet)"
        )
    folders = sorted({str(file.parent) for file, _ in found})
    if len(folders) > 1:
        raise DataError(
            f"{folder}: split {split!r} is in several folders, give one as path: "
            + ", ".join(folders)
        )
    numbers = [int(match["index"] or 0) for _, match in found]
    counts = {int(match["count"] or 1) for _, match in found}
    if len(counts) > 1 or numbers != list(range(max(counts))):
        raise DataError(
            f"{folders[0]}: split {split!r} must have files 0 to {max(counts) - 1}, each once; "
            f"found {numbers}"
        )
    return [file for file, _ in found]


def split_name(path: str | os.PathLike[str], split: str) -> str:
    """Short name of a split for logs, FOLDER/SPLIT."""
    return f"{Path(path).resolve().name}/{split}"


def read_schema(file: Path) -> Any:
    """The Arrow schema of a parquet file. Raises DataError, which names the file."""
    with _opened(file) as reader:
        return reader.schema_arrow


def read_table(file: Path, columns: Sequence[str]) -> Any:
    """The columns of a parquet file, at least one row of them. Raises DataError otherwise."""
    with _opened(file) as reader:
        table = reader.read(columns=list(columns))
        table.validate(full=True)  # offsets beyond the data would be read from other memory
    if table.num_rows == 0:
        raise DataError(f"{file}: no rows")
    return table


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A reader of the file, inside of which every error of the file is a DataError."""
    with experiments_extra():
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as reader:
            yield reader
    # pyarrow passes on errors of many kinds from damaged footers and pages.
    except (pyarrow.ArrowException, OSError, UnicodeError, KeyError, MemoryError) as error:
        raise DataError(f"{file}: not a whole parquet file: {one_line(error)}") from error


def features(file: Path, schema: Any) -> dict[str, Any]:
    """Hugging Face's description of the columns by name, {} where the file has none."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = metadata.get("info", {}).get("features", {})
        return {name: dict(found.get(name, {})) for name in schema.names}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{file}: the schema's huggingface metadata is malformed") from error


def find_column(
    file: Path, schema: Any, argument: str, given: str | None, kind: str, usual: Sequence[str]
) -> str:
    """The column that is meant: the given one, or the only one of its kind, or with a usual name.

    Args:
      file: The file, for errors.
      schema: Its Arrow schema.
      argument: Name of the argument of the column, for errors.
      given: The column that the user names, or None.
      kind: Kind of the column in Hugging Face's metadata, such as "Image"; "" for none.
      usual: Names of such columns where the metadata tells nothing.

    Raises:
      DataError: No column or several columns fit.
    """
    kinds = {name: feature.get("_type") for name, feature in features(file, schema).items()}
    by_kind = [name for name in schema.names if kind and kinds[name] == kind]
    by_name = [name for name in usual if name in schema.names]
    candidates = [given] if given is not None else by_kind or by_name
    if len(candidates) == 1 and schema.names.count(candidates[0]) == 1:
        return candidates[0]
    known = any(name in schema.names for name in candidates)
    problem = "several columns fit" if known else "no such column"
    raise DataError(
        f"{file}: {argument}={given!r}: {problem}; name one of: {', '.join(schema.names)}"
    )


def without_dictionary(column: Any) -> Any:
    """The values of a column without dictionary encoding, which stores few distinct values."""
    from pyarrow import types

    return column.cast(column.type.value_type) if types.is_dictionary(column.type) else column
