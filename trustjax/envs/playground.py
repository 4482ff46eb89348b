"""Environments of MuJoCo Playground, https://github.com/google-deepmind/mujoco_playground."""

from collections.abc import Iterator, Mapping
from typing import Any

from trustjax.envs.arguments import check_arguments
from trustjax.envs.brax import OWN_ARGUMENTS, Brax
from trustjax.envs.third_party import building, import_extra


def names() -> tuple[str, ...]:
    """Names of Playground's environments; raises ModuleNotFoundError if it is not installed."""
    return tuple(_package().registry.ALL_ENVS)


def playground(name: str, /, **kwargs: Any) -> Brax:
    """An environment of MuJoCo Playground, which has brax's interface.

    Args:
      name: Name in Playground, such as "CartpoleBalance".
      **kwargs: `max_steps_in_episode`, `action_repeat` and `fresh_resets` as in `Brax`; the first
        two default to the environment's configuration. Other arguments are entries of that
        configuration, such as `ctrl_dt`; nested ones are written with dots, as in
        `{"noise_config.level": 0.5}`. `impl`, the implementation of the simulation, is "jax" by
        default.

    Raises:
      ValueError: The configuration has no such entry, or as in `Brax`.
    """
    registry = _package().registry
    with building():
        config = registry.get_default_config(name).to_dict()
        own = {key: kwargs.pop(key) for key in OWN_ARGUMENTS if key in kwargs}
        # These two are meant for the training loop; the environment itself does not use them.
        repeats, length = config.pop("action_repeat", 1), config.pop("episode_length")
        check_arguments(f"playground:{name}", kwargs, [*OWN_ARGUMENTS, *_entries(config)])
        if "impl" in config:  # Playground's own default, "warp", leaks tracers out of a rollout
            kwargs.setdefault("impl", "jax")
        env = registry.load(name, config_overrides=kwargs)
    own.setdefault("action_repeat", repeats)
    # The configuration counts steps of the simulation; a last action may have fewer repeats.
    own.setdefault("max_steps_in_episode", -(-length // repeats))
    return Brax(f"playground:{name}", env=env, **own)


def _entries(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _package() -> Any:
    return import_extra("mujoco_playground", install="playground")
