"""Environments by name."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from trustjax.envs import brax, gymnax, playground, probe
from trustjax.envs.arguments import check_arguments, check_known, merged, split_name
from trustjax.envs.environment import Environment


def make(name: str, /, **kwargs: Any) -> Environment:
    """The environment that `name` says, behind one interface.

    Args:
      name: "SOURCE:NAME" or "SOURCE:NAME?key=value&key=value". Sources: "gymnax", "brax",
        "playground" (MuJoCo Playground, if it is installed) and "probe". `names` lists the names.
      **kwargs: the same as keys in the name: `max_steps_in_episode`, the time limit, and what the
        classes of the sources take, such as brax's `backend`.

    Raises:
      ValueError: an unknown source or name, with the closest ones; an unknown argument, or one that
        is given twice, is of the wrong kind, or out of range.
      ModuleNotFoundError: the package is not installed; it says how to.

    >>> env = make("gymnax:CartPole-v1", max_steps_in_episode=200)
    >>> env.num_actions, env.observation_shape
    (2, (4,))
    """
    source, own, options = split_name(name)
    _check_source(source, name)
    check_known(f"environment of {source}", own, names(source))
    return _SOURCES[source].make(own, **merged(name, options, kwargs))


@functools.cache
def make_once(name: str) -> Environment:
    """The same as `make(name)`, but always the same object: it is built at the first call alone."""
    return make(name)


def names(source: str) -> tuple[str, ...]:
    """Names of the environments of a source, without "SOURCE:".

    Raises ValueError for an unknown source, ModuleNotFoundError if its package is not installed.

    >>> names("probe")[:3]
    ('constant', 'observation', 'delayed')
    """
    _check_source(source, source)
    return _SOURCES[source].names()


class _Source(NamedTuple):
    names: Callable[[], tuple[str, ...]]
    make: Callable[..., Environment]


def _brax(name: str, /, **kwargs: Any) -> Environment:
    if "env" in kwargs:
        raise ValueError("env is not for names: write trustjax.envs.brax.Brax(name, env=env)")
    return brax.Brax(name, **kwargs)


def _probe(name: str, /, **kwargs: Any) -> Environment:
    check_arguments(f"probe:{name}", kwargs, ["max_steps_in_episode"])
    return probe.Probe(name, **kwargs)


_SOURCES = {
    "gymnax": _Source(gymnax.names, gymnax.Gymnax),
    "brax": _Source(brax.names, _brax),
    "playground": _Source(playground.names, playground.playground),
    "probe": _Source(lambda: probe.PROBES, _probe),
}


def _check_source(source: str, given: str) -> None:
    if source not in _SOURCES:
        raise ValueError(
            f"unknown source of environments in {given!r}; write "
            f"{', '.join(f'{known}:NAME' for known in _SOURCES)}"
        )
