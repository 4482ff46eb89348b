"""Arrays and JSON out of untrusted files, without pickles, and messages about them in one line."""

import io
import json
import math
import reprlib
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError

Arrays = dict[str, npt.NDArray[Any]]

TEXT_OR_FLOAT = "fU"  # kinds of NumPy's dtypes
_REPR = reprlib.Repr()
_REPR.maxstring = 80


def read_arrays(file: Any, size: int, *, kinds: Callable[[str], str]) -> Arrays:
    """All arrays of an .npz file of `size` bytes; none is larger than its bytes in the file.

    `kinds` maps the name of an array to the kinds of NumPy's dtypes that it may have.
    """
    arrays: Arrays = {}
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{short(member.filename)} must not be compressed")
            if sum(member.file_size for member in members) > size:
                raise ValueError("it says that it holds more bytes than there are")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"{short(name)} is there twice")
                try:
                    arrays[name] = _array(archive.read(member), kinds(name))
                except Exception as error:  # see below
                    raise ValueError(f"{short(name)}: {short_error(error)}") from error
    # zipfile and NumPy's header parser do not document what they raise for damaged bytes.
    except Exception as error:
        raise ValueError(short_error(error)) from error
    return arrays


def _array(content: bytes, kinds: str) -> npt.NDArray[Any]:
    """The array in the content of an .npy file, whose dtype is of one of these kinds of NumPy."""
    stream = io.BytesIO(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("its header must be of version 1.0")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in kinds:
        wanted = "floating" if kinds == TEXT_OR_FLOAT else "of numbers"
        raise ValueError(f"it must be {wanted}, got {short(dtype)}")
    data = content[stream.tell() :]
    if min(shape, default=0) < 0 or len(data) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"its header says shape {short(shape)}, but it has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def parsed(text: str) -> dict[str, Any]:
    """The JSON object `about`; raises ValueError for anything else, and for a key that is twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        about = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"about must be JSON: {short_error(error)}") from error
    if not isinstance(about, dict):
        raise FieldError("about", "be an object", short(about))
    return about


def check_names(what: str, found: Mapping[str, Any], expected: Collection[str]) -> None:
    """Raises ValueError for a name that is missing, and for one that is not expected."""
    for name in expected:
        if name not in found:
            raise ValueError(f"{what} must have {name}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{what} must not have {short(name)}")


def short(value: Any) -> str:
    """A representation of bounded length."""
    return _REPR.repr(value if isinstance(value, str | int | list | tuple | dict) else str(value))


def short_error(error: Exception) -> str:
    """The message of an error in one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__
