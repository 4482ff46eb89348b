"""Third-party packages: imports without the messages they print, and calls in their own mode."""

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from trustjax._checks import MissingPackageError


def import_extra(module: str, *, install: str) -> ModuleType:
    """Imports `module`; if it is missing, the error says which package to `pip install`."""
    try:
        with building():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{module} needs {error.name}, which is not installed: pip install {install}",
            name=error.name,
        ) from error


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Context for imports and constructors: `default_promotion`, silence, and concrete arrays.

    Arrays must be concrete because an environment may be built while a function is traced, and used
    after that.
    """
    with (
        default_promotion(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        _silent_mujoco(),
        jax.ensure_compile_time_eval(),
    ):
        yield


@contextlib.contextmanager
def default_promotion() -> Iterator[None]:
    """Context with JAX's default promotion of dtypes and ranks, which these packages rely on.

    Their warnings, such as those about deprecated functions, are ignored: the caller cannot act on
    them.
    """
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _silent_mujoco() -> Iterator[None]:
    """Context without MuJoCo's warnings, which C code writes to stderr and to a file."""
    mujoco = sys.modules.get("mujoco")
    if mujoco is None:
        yield
        return
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def strip_weak_types(tree: Any) -> Any:
    """The tree without weak types, which make a loop that carries it compile twice or fail."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), tree)
