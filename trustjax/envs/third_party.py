"""Third-party packages: imported without the messages they print, and called in their own mode."""

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


def import_extra(module: str, *, install: str) -> ModuleType:
    """Imports `module`; if it is missing, the error says what to `pip install`."""
    try:
        with building():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} needs {error.name}, which is not installed: pip install {install}",
            name=error.name,
        ) from error


@contextlib.contextmanager
def building() -> Iterator[None]:
    """For imports and constructors: as `default_promotion`, silent, with arrays that are concrete.

    An environment may be made while a function is traced, and used after that.
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
    """JAX's default promotion of dtypes and ranks, which these packages are written for.

    What they use that is deprecated is not the caller's concern: their warnings are ignored.
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
    """MuJoCo itself, in C, writes to the standard error and to a file in the working directory."""
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
    """Without weak types, with which a loop that carries the tree is compiled twice or refused."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), tree)
