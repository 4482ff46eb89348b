"""Labelled images in memory: scikit-learn's digits, and Hugging Face's parquet folders."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trustjax._files import experiments_extra
from trustjax.data._parquet import (
    features,
    find_column,
    read_schema,
    read_table,
    split_files,
    split_name,
    without_dictionary,
)
from trustjax.data.decoding import DataError as DataError
from trustjax.data.decoding import decode_image, pillow_warnings_as_errors

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

    @property
    def num_examples(self) -> int:
        """How many images there are."""
        return len(self.labels)

    def batch(self, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """The images of the rows in [0, 1], "image", and their classes, "label"."""
        return {"image": unit_range(self.images[rows]), "label": self.labels[rows]}


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
    files = split_files(path, split)
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
    return ImageDataset(all_images, all_labels, num_classes, split_name(path, split))


def _read_file(
    file: Path, image_column: str | None, label_column: str | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], _Columns]:
    """Images, labels and columns of one parquet file."""
    columns = _find_columns(file, read_schema(file), image_column, label_column)
    table = read_table(file, (columns.image, columns.label))
    labels = _labels(file, columns, table.column(columns.label))
    return _images(file, columns.image, table.column(columns.image)), labels, columns


def _find_columns(
    file: Path, schema: Any, image_column: str | None, label_column: str | None
) -> _Columns:
    """Which columns hold images and labels, by Hugging Face's metadata or else by name."""
    label = find_column(file, schema, "label_column", label_column, "ClassLabel", _LABEL_NAMES)
    names = features(file, schema).get(label, {}).get("names")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(n, str) for n in names)
    ):
        raise DataError(
            f"{file}: the schema's huggingface metadata must list the names of {label!r}"
        )
    return _Columns(
        image=find_column(file, schema, "image_column", image_column, "Image", _IMAGE_NAMES),
        label=label,
        class_names=None if names is None else tuple(names),
    )


def _labels(file: Path, columns: _Columns, column: Any) -> npt.NDArray[np.int32]:
    """Labels int32 [n] of an integer column without nulls, all in range."""
    from pyarrow import types

    column = without_dictionary(column)
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
    column = without_dictionary(column)
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
