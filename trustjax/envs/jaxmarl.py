"""Multi-agent particle environments of JaxMARL, https://github.com/FLAIROx/JaxMARL."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_count
from trustjax.envs.arguments import check_arguments
from trustjax.envs.multi_agent import Actions, MultiAgentEnvironment, MultiAgentStep, Observations
from trustjax.envs.third_party import building, default_promotion, import_extra, strip_weak_types


def names() -> tuple[str, ...]:
    """Names of JaxMARL's particle environments (MPE)."""
    return tuple(name for name in _package().registered_envs if name.startswith("MPE_"))


class JaxMARL(MultiAgentEnvironment):
    """A particle environment (MPE) of JaxMARL, whose resets and steps are JaxMARL's own.

    These environments end at their time limit alone, so that every end is a truncation, which
    JaxMARL does not say. JaxMARL's other environments also end in other ways, and are refused.
    JaxMARL tests its limit before it counts the step: an episode has `max_steps` + 1 steps, so 26
    unless given.

    The world state is all observations side by side, as in JaxMARL's own training scripts.

    Args:
      name: Name in JaxMARL, such as "MPE_simple_spread_v3".
      **kwargs: Arguments of the environment's constructor, such as `max_steps` and `num_agents`.

    Raises:
      ValueError: The name or an argument is unknown, or `max_steps` is below 1.
      ModuleNotFoundError: JaxMARL is not installed.
    """

    def __init__(self, name: str, /, **kwargs: Any) -> None:
        """Builds JaxMARL's environment."""
        self.name = f"jaxmarl:{name}"
        if not name.startswith("MPE_"):
            raise FieldError("name", "be a particle environment, MPE_...", repr(name))
        jaxmarl = _package()
        with building():
            own = inspect.signature(type(jaxmarl.make(name))).parameters
            known = [*(key for key in own if key != "kwargs"), "max_steps", "dt"]
            check_arguments(self.name, kwargs, known)
            check_count("max_steps", kwargs.get("max_steps"), at_least=1)
            self.unwrapped = jaxmarl.make(name, **kwargs)

    @property
    def agents(self) -> list[str]:
        """Names of the agents."""
        return list(self.unwrapped.agents)

    @property
    def observation_spaces(self) -> dict[str, Any]:
        """JaxMARL's spaces."""
        return dict(self.unwrapped.observation_spaces)

    @property
    def action_spaces(self) -> dict[str, Any]:
        """JaxMARL's spaces."""
        return dict(self.unwrapped.action_spaces)

    @property
    def agent_classes(self) -> dict[str, list[str]]:
        """JaxMARL's classes of agents."""
        return dict(self.unwrapped.agent_classes)

    def reset(self, key: jax.Array) -> tuple[Observations, Any]:
        """See `MultiAgentEnvironment`."""
        with default_promotion():
            observations, state = self.unwrapped.reset(key)
            return self._with_world_state(observations), strip_weak_types(state)

    def step_env(self, key: jax.Array, state: Any, actions: Actions) -> MultiAgentStep:
        """See `MultiAgentEnvironment`."""
        with default_promotion():
            observations, state, rewards, dones, infos = self.unwrapped.step_env(
                key, state, actions
            )
            rewards = {
                agent: jnp.reshape(jnp.asarray(reward, jnp.result_type(float)), ())
                for agent, reward in rewards.items()
            }
            truncated = jnp.broadcast_to(dones["__all__"], self.num_agents)
            infos = {**infos, "terminated": jnp.zeros_like(truncated), "truncated": truncated}
            return (
                self._with_world_state(observations),
                strip_weak_types(state),
                rewards,
                dones,
                infos,
            )

    def get_obs(self, state: Any) -> Observations:
        """See `MultiAgentEnvironment`."""
        with default_promotion():
            return self._with_world_state(self.unwrapped.get_obs(state))

    def get_world_state(self, state: Any) -> jax.Array:
        """All observations side by side, float [d]."""
        return self.get_obs(state)["world_state"]

    def _with_world_state(self, observations: Observations) -> Observations:
        own = [jnp.ravel(observations[agent]) for agent in self.agents]
        return {**observations, "world_state": jnp.concatenate(own)}


def _package() -> Any:
    return import_extra("jaxmarl", install='"trustjax[jaxmarl]"')
