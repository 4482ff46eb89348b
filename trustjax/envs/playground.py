"""Environments of MuJoCo Playground, https://github.com/google-deepmind/mujoco_playground."""

from collections.abc import Iterator, Mapping
from typing import Any

from trustjax.envs.arguments import check_arguments
from trustjax.envs.brax import OWN_ARGUMENTS, Brax
from trustjax.envs.third_party import building, import_extra


def names() -> tuple[str, ...]:
    """Names of Playground's environments; ModuleNotFoundError if it is not installed."""
    return tuple(_package().registry.ALL_ENVS)


def playground(name: str, /, **kwargs: Any) -> Brax:
    """An environment of MuJoCo Playground, which has brax's interface.

    Args:
      name: as Playground has it, such as "CartpoleBalance".
      **kwargs: `max_steps_in_episode`, `action_repeat` (by default those of the environment's
        configuration) and `fresh_resets` as for `Brax`; others are entries of the configuration,
        such as `ctrl_dt`, with points for those within it, `{"noise_config.level": 0.5}`. `impl`,
        which simulates, is "jax" unless given.

    Raises:
      ValueError: an entry that the configuration does not have, and as `Brax`.
    """
    registry = _package().registry
    with building():
        config = registry.get_default_config(name).to_dict()
        own = {key: kwargs.pop(key) for key in OWN_ARGUMENTS if key in kwargs}
        # These two are for whoever runs the environment; they do not change what it does.
        repeats, length = config.pop("action_repeat", 1), config.pop("episode_length")
        check_arguments(f"playground:{name}", kwargs, [*OWN_ARGUMENTS, *_entries(config)])
        if "impl" in config:  # Playground's own default, "warp", leaks tracers out of a rollout
            kwargs.setdefault("impl", "jax")
        env = registry.load(name, config_overrides=kwargs)
    own.setdefault("action_repeat", repeats)
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
