"""Labelled images in memory: scikit-learn's digits, and Hugging Face's parquet folders."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError
from trustjax._files import experiments_extra, local_folder, one_line
from trustjax.data.decoding import DataError as DataError
from trustjax.data.decoding import decode_image, pillow_warnings_as_errors

_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.parquet")
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label")
# Pillow decodes outside the GIL, but for small images Python's share dominates: more threads than
# this only wait for each other.
_DECODING_THREADS = min(4, os.cpu_count() or 1)
_ROWS_PER_TASK = 512


class ImageDataset(NamedTuple):
    """Images of one size with their classes.

    Attributes:
      images: Images, uint8 [n, height, width, channels] in 0..255.
      labels: Classes, int32 [n] in 0..num_classes - 1.
      num_classes: Number of classes, including classes without an example.
      name: Short name for logs.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int32]
    num_classes: int
    name: str


def unit_range(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Images of 0..255 as float32 in [0, 1], of the same shape; 255 gives exactly 1."""
    scaled = images.astype(np.float32)
    scaled /= 255
    return scaled


class _Columns(NamedTuple):
    image: str
    label: str
    class_names: tuple[str, ...] | None  # of the label, where the file's metadata has them


def digits() -> ImageDataset:
    """scikit-learn's handwritten digits: 1797 images, uint8 [1797, 8, 8, 1], 10 classes, no split.

    The grey values 0..16 are rescaled to 0..255. Raises ImportError without scikit-learn.
    """
    with experiments_extra():
        from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return ImageDataset(images[..., None], bunch.target.astype(np.int32), 10, "digits")


def hugging_face(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageDataset:
    """One split of a labelled image set in Hugging Face's parquet layout, decoded into memory.

    Args:
      path: A folder with files `SPLIT-00000-of-0000N.parquet` at any depth, or a hub id
        `owner/name`, which is downloaded once and then read in the same way.
      split: Name of the split to read.
      image_column: Column of encoded images: BMP, GIF, JPEG, PNG, PPM, TIFF or WebP. The
        orientation in their EXIF metadata is applied. By default the only column that the file's
        metadata calls an Image; without metadata the column called image or img.
      label_column: Column of integer classes. By default the only column that the metadata calls
        a ClassLabel; without metadata the column called label, labels or fine_label.

    Returns:
      Images uint8 [n, height, width, 1 or 3], in the order of the files. The number of classes is
      the number of ClassLabel names, or the largest label of this split plus one.

    Raises:
      DataError: There is no such folder, split or column, or several columns fit; a file cannot
        be read; there is a null; an image cannot be decoded to 8-bit grey or colour without loss
        (several frames, 16 bits, alpha, other transparent pixels, CMYK), or is larger than
        Pillow's MAX_IMAGE_PIXELS; images differ in shape; or a label is out of range.
      ImportError: A package of the `experiments` extra is missing.
    """
    folder = local_folder(
        "path", path, DataError, "dataset", repo_type="dataset", allow_patterns="*.parquet"
    )
    files = _split_files(folder, split)
    parts = [_read_file(file, image_column, label_column) for file in files]
    (first_images, first_labels, first_columns), *others = parts
    for file, (images, _, columns) in zip(files[1:], others, strict=True):
        if columns != first_columns:
            raise DataError(f"{file}: columns {columns} differ from {first_columns} in {files[0]}")
        if images.shape[1:] != first_images.shape[1:]:
            raise DataError(
                f"{file}, row 0, column {columns.image!r}: image of shape {images.shape[1:]}, but "
                f"those in {files[0]} are {first_images.shape[1:]}"
            )
    all_images = np.concatenate([first_images, *(images for images, _, _ in others)])
    all_labels = np.concatenate([first_labels, *(labels for _, labels, _ in others)])
    names = first_columns.class_names
    num_classes = int(all_labels.max()) + 1 if names is None else len(names)
    return ImageDataset(all_images, all_labels, num_classes, f"{Path(path).resolve().name}/{split}")


def split(
    dataset: ImageDataset, fractions: Mapping[str, float], *, seed: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Disjoint random parts of a dataset, each with the same share of every class.

    A part of fraction f has f n of all n rows, rounded, and about f m of a class with m examples.

    Args:
      dataset: The dataset to split.
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


def _split_files(folder: Path, split: str) -> list[Path]:
    """All shards of a split, in order."""
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
            "(files named SPLIT-00000-of-0000N.parquet)"
        )
    folders = sorted({str(file.parent) for file, _ in found})
    if len(folders) > 1:
        raise DataError(
            f"{folder}: split {split!r} is in several folders, give one as path: "
            + ", ".join(folders)
        )
    numbers = [int(match["index"]) for _, match in found]
    counts = {int(match["count"]) for _, match in found}
    if len(counts) > 1 or numbers != list(range(max(counts))):
        raise DataError(
            f"{folders[0]}: split {split!r} must have files 0 to {max(counts) - 1}, each once; "
            f"found {numbers}"
        )
    return [file for file, _ in found]


def _read_file(
    file: Path, image_column: str | None, label_column: str | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], _Columns]:
    """Images, labels and columns of one parquet file."""
    with experiments_extra():
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as reader:
            schema = reader.schema_arrow
            columns = _find_columns(file, schema, image_column, label_column)
            table = reader.read(columns=[columns.image, columns.label])
            table.validate(full=True)  # offsets beyond the data would be read from other memory
    # pyarrow passes on errors of many kinds from damaged footers and pages.
    except (pyarrow.ArrowException, OSError, UnicodeError, KeyError, MemoryError) as error:
        raise DataError(f"{file}: not a whole parquet file: {one_line(error)}") from error
    if table.num_rows == 0:
        raise DataError(f"{file}: no rows")
    labels = _labels(file, columns, table.column(columns.label))
    return _images(file, columns.image, table.column(columns.image)), labels, columns


def _find_columns(
    file: Path, schema: Any, image_column: str | None, label_column: str | None
) -> _Columns:
    """Which columns hold images and labels, by Hugging Face's metadata or else by name."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        kinds = {name: features.get(name, {}).get("_type") for name in schema.names}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: the schema's huggingface metadata is malformed") from error

    def find(argument: str, given: str | None, kind: str, usual: Sequence[str]) -> str:
        by_kind = [name for name in schema.names if kinds[name] == kind]
        by_name = [name for name in usual if name in schema.names]
        candidates = [given] if given is not None else by_kind or by_name
        if len(candidates) == 1 and schema.names.count(candidates[0]) == 1:
            return candidates[0]
        known = any(name in schema.names for name in candidates)
        problem = "several columns fit" if known else "no such column"
        raise DataError(
            f"{file}: {argument}={given!r}: {problem}; name one of: {', '.join(schema.names)}"
        )

    label = find("label_column", label_column, "ClassLabel", _LABEL_NAMES)
    names = features.get(label, {}).get("names")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(n, str) for n in names)
    ):
        raise DataError(
            f"{file}: the schema's huggingface metadata must list the names of {label!r}"
        )
    return _Columns(
        image=find("image_column", image_column, "Image", _IMAGE_NAMES),
        label=label,
        class_names=None if names is None else tuple(names),
    )


def _labels(file: Path, columns: _Columns, column: Any) -> npt.NDArray[np.int32]:
    """Labels int32 [n] of an integer column without nulls, all in range."""
    from pyarrow import types

    column = _without_dictionary(column)
    if not types.is_integer(column.type):
        raise DataError(f"{file}, column {columns.label!r}: {column.type} is not an integer type")
    nulls = np.flatnonzero(column.is_null().to_numpy())
    if len(nulls):
        raise DataError(f"{file}, row {nulls[0]}, column {columns.label!r}: null")
    labels = column.to_numpy()
    largest = (
        np.iinfo(np.int32).max if columns.class_names is None else len(columns.class_names) - 1
    )
    outside = np.flatnonzero((labels < 0) | (labels > largest))
    if len(outside):
        raise DataError(
            f"{file}, row {outside[0]}, column {columns.label!r}: label {labels[outside[0]]} is "
            f"not in 0..{largest}"
        )
    return np.asarray(labels, np.int32)


def _images(file: Path, name: str, column: Any) -> npt.NDArray[np.uint8]:
    """Decodes a column of encoded images, or of structs with `bytes`, to one array."""
    from pyarrow import compute, types

    if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = compute.struct_field(column, "bytes")
    column = _without_dictionary(column)
    if not (types.is_binary(column.type) or types.is_large_binary(column.type)):
        raise DataError(f"{file}, column {name!r}: {column.type} is not an encoded image")
    with experiments_extra():
        import PIL  # noqa: F401, what decode_image needs
    encoded: list[bytes | None] = column.to_pylist()

    def decode(row: int) -> npt.NDArray[np.uint8]:
        source = f"{file}, row {row}, column {name!r}"
        image = encoded[row]
        if image is None:
            raise DataError(f"{source}: null")
        return decode_image(source, image)

    with pillow_warnings_as_errors():
        first = decode(0)
        try:
            images = np.empty((len(encoded), *first.shape), np.uint8)
        except MemoryError as error:
            raise DataError(
                f"{file}, column {name!r}: no memory for {len(encoded)} images of shape "
                f"{first.shape}, that of row 0"
            ) from error
        images[0] = first

        def decode_rows(start: int) -> None:
            for row in range(start, min(start + _ROWS_PER_TASK, len(encoded))):
                image = decode(row)
                if image.shape != first.shape:
                    raise DataError(
                        f"{file}, row {row}, column {name!r}: image of shape {image.shape}, but "
                        f"row 0 is {first.shape}"
                    )
                images[row] = image

        with ThreadPoolExecutor(_DECODING_THREADS) as pool:
            for _ in pool.map(decode_rows, range(1, len(encoded), _ROWS_PER_TASK)):
                pass  # raises the error of the first bad row
    return images


def _without_dictionary(column: Any) -> Any:
    """The values of a column without dictionary encoding, which stores few distinct values."""
    from pyarrow import types

    return column.cast(column.type.value_type) if types.is_dictionary(column.type) else column
