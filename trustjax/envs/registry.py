"""Environments by name."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from trustjax._checks import FieldError
from trustjax.envs import brax, gymnasium, gymnax, jaxmarl, playground, probe
from trustjax.envs.arguments import check_arguments, check_known, merged, split_name
from trustjax.envs.environment import Environment
from trustjax.envs.multi_agent import MultiAgentEnvironment
from trustjax.envs.uav import MultiUAV


def make(name: str, /, **kwargs: Any) -> Environment | Any:
    """Builds the environment with this name: an `Environment`, or a `MultiAgentEnvironment`.

    Args:
      name: "SOURCE:NAME" or "SOURCE:NAME?key=value&key=value". The sources are "gymnax", "brax",
        "playground" (MuJoCo Playground, if it is installed), "gymnasium" (stepped on the host, and
        slow) and "probe"; with several agents, "trustjax" and "jaxmarl" (particle environments).
        `names` lists the names of a source.
      **kwargs: Options as in the name: the time limit `max_steps_in_episode`, and the arguments of
        the classes of the sources, such as brax's `backend`.

    Raises:
      ValueError: The source or the name is unknown, where the message lists the closest ones, or an
        argument is unknown, given twice, of the wrong kind, or out of range.
      ModuleNotFoundError: The package is not installed; the message says how to install it.

    >>> env = make("gymnax:CartPole-v1", max_steps_in_episode=200)
    >>> env.num_actions, env.observation_shape
    (2, (4,))
    """
    source, own, options = split_name(name)
    _check_source(source, name)
    check_known(f"environment of {source}", own, names(source))
    return _SOURCES[source].make(own, **merged(name, options, kwargs))


@functools.cache
def make_once(name: str) -> Environment | Any:
    """The same as `make(name)`, but built only once: every call returns the same object."""
    return make(name)


def as_environment(env: str | Environment) -> Environment:
    """The environment itself, from an object or a name; the same object for the same name.

    Raises ValueError for anything else, with the adapter to use, and like `make` for a bad name.
    """
    given = env
    if isinstance(env, str):
        env = make_once(env)
    if isinstance(env, Environment):
        return env
    raise FieldError(
        "env",
        "be the name of an environment or a trustjax.envs.Environment",
        env if isinstance(env, type) else repr(given) if isinstance(given, str) else type(env),
        advice=next(advice for is_kind, advice in _OTHERS if is_kind(env)),
    )


def names(source: str) -> tuple[str, ...]:
    """Names of the environments of a source, without "SOURCE:".

    Raises ValueError for an unknown source, ModuleNotFoundError if its package is not installed.

    >>> names("probe")[:3]
    ('constant', 'observation', 'delayed')
    """
    _check_source(source, source)
    return _SOURCES[source].names()


# What to write for an object that is no environment, by the first test that it passes.
_OTHERS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda env: isinstance(env, type), "give an object of the class, as in env=Walk()"),
    (
        lambda env: hasattr(env, "step_env") and hasattr(env, "agents"),
        "it has several agents, which the algorithms of trustjax.agents.multi train",
    ),
    (
        lambda env: hasattr(env, "observation_size") or hasattr(env, "action_size"),
        'write trustjax.envs.brax.Brax("mine", env=env)',
    ),
    (
        lambda env: hasattr(env, "step_env") and hasattr(env, "default_params"),
        'register its class, gymnax.register("Mine-v0", Mine), and write env="gymnax:Mine-v0"',
    ),
    (
        lambda env: hasattr(env, "observation_space") and hasattr(env, "action_space"),
        'write trustjax.envs.gymnasium.Gymnasium("mine", make=Mine), which is slow, as its steps '
        "are Python's",
    ),
    (lambda env: True, "subclass trustjax.envs.EpisodicEnvironment, which takes plain steps"),
)


class _Source(NamedTuple):
    names: Callable[[], tuple[str, ...]]
    make: Callable[..., Environment | MultiAgentEnvironment]


def _brax(name: str, /, **kwargs: Any) -> Environment:
    if "env" in kwargs:
        raise ValueError(
            "env must not be given with a name: write trustjax.envs.brax.Brax(name, env=env)"
        )
    return brax.Brax(name, **kwargs)


def _gymnasium(name: str, /, **kwargs: Any) -> Environment:
    if "make" in kwargs:
        raise ValueError(
            "make must not be given with a name: write "
            "trustjax.envs.gymnasium.Gymnasium(name, make=make)"
        )
    return gymnasium.Gymnasium(name, **kwargs)


def _trustjax(name: str, /, **kwargs: Any) -> MultiAgentEnvironment:
    check_arguments(f"trustjax:{name}", kwargs, [field.name for field in fields(MultiUAV)])
    return MultiUAV(**kwargs)


def _probe(name: str, /, **kwargs: Any) -> Environment:
    check_arguments(f"probe:{name}", kwargs, ["max_steps_in_episode"])
    return probe.Probe(name, **kwargs)


_SOURCES = {
    "gymnax": _Source(gymnax.names, gymnax.Gymnax),
    "brax": _Source(brax.names, _brax),
    "playground": _Source(playground.names, playground.playground),
    "gymnasium": _Source(gymnasium.names, _gymnasium),
    "probe": _Source(lambda: probe.PROBES, _probe),
    "trustjax": _Source(lambda: ("MultiUAV",), _trustjax),
    "jaxmarl": _Source(jaxmarl.names, jaxmarl.JaxMARL),
}


def _check_source(source: str, given: str) -> None:
    if source not in _SOURCES:
        raise ValueError(
            f"unknown source of environments in {given!r}; write "
            f"{', '.join(f'{known}:NAME' for known in _SOURCES)}"
        )
