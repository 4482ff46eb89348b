"""Networks of one's own in front of the hidden layers, and checks of what they see."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trustjax._checks import FieldError
from trustjax.envs import Environment
from trustjax.models.observations import ACTION_MASK, Flat, Key, seen_parts


def hashable(module: Any) -> Any:
    """The module with tuples in place of the lists among its fields, also those of its parts.

    Compiled functions are looked up by their modules, and lists cannot be.
    """
    if isinstance(module, list | tuple) and type(module) in (list, tuple):
        return tuple(map(hashable, module))
    if not isinstance(module, nn.Module):
        return module
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init and field.name not in ("parent", "name")
    }
    changed = {name: hashable(value) for name, value in fields.items()}
    if all(changed[name] is value for name, value in fields.items()):
        return module
    return module.clone(**changed)


def torso_kwargs(config: Any, env: Environment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the `Torso` of the policy, and of that of the critics, in a Config."""
    policy = {
        name: getattr(config, name)
        for name in ("hidden", "activation", "orthogonal", "dtype", "network")
    }
    hidden, network = config.critic_hidden, config.critic_network
    critics = policy | {
        "hidden": config.hidden if hidden is None else hidden,
        "network": config.network if network is None else network,
        "obs_key": config.value_obs_key,
    }
    policy["obs_key"] = config.policy_obs_key
    # With parts, or one network alone, observations stay as they are until `Flat` joins them.
    if isinstance(env.observation_shape, dict) or critics["network"] is not None:
        for kwargs in (policy, critics):
            kwargs["network"] = kwargs["network"] or Flat()
    return policy, critics


def check_key(name: str, key: Key, shape: Any) -> None:
    """Raises ValueError unless `key` names parts of observations of this shape."""
    if key is None:
        return
    if not isinstance(shape, dict):
        raise FieldError(name, "be None for an environment whose observation is one array", key)
    parts = sorted(part for part in shape if part != ACTION_MASK)
    if not key or not {key} <= {*parts} if isinstance(key, str) else not {*key} <= {*parts}:
        raise FieldError(name, f"name parts of the observation, {', '.join(parts)}", repr(key))


def check_modules(config: Any) -> None:
    """Raises ValueError unless the networks of a Config map its observations to features."""
    modules = (
        ("network", config.network, config.policy_obs_key),
        ("critic_network", config.critic_network, config.value_obs_key),
        # Without a network of their own the critics have one like that of the policy.
        ("network", config.network, config.value_obs_key),
    )
    if config.network is None and config.critic_network is None:
        return
    env, params = config.environment, config.env_params
    observation = jax.eval_shape(lambda key: env.reset(key, params)[0], jax.random.key(0))
    for name, module, key in modules[: 2 if config.critic_network is not None else 3]:
        if module is not None:
            check_features(name, module, seen_parts(observation, key))


def check_features(name: str, module: Any, observation: Any) -> None:
    """Raises ValueError unless the module maps 3 observations to features [3, width]."""
    if not isinstance(module, nn.Module):
        raise FieldError(name, "be a flax.linen module, such as CNN()", repr(module))
    try:
        hash(module)
    except TypeError as error:
        raise FieldError(name, "have fields that can be hashed", repr(module)) from error
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), observation)
    try:
        variables = jax.eval_shape(module.init, jax.random.key(0), batch)
        only_params = not set(variables) - {"params"}
        # Flax lends the key of the parameters to dropout in `init`, but not in `apply`.
        features: Any = None
        if only_params:
            features = jax.eval_shape(module.apply, variables, batch)
    except Exception as error:  # whatever the module's own code raises
        seen = jax.tree.map(lambda x: f"{x.dtype} {list(x.shape)}", batch)
        text = " ".join(str(error).split())[:300]
        raise FieldError(
            name, f"map observations, such as {seen}, to features, float [batch, width]",
            f"{type(error).__name__}: {text}",
            advice="it is called with the observations alone, in training as in evaluation",
        ) from error  # fmt: skip
    if not only_params:
        raise FieldError(
            name, "have parameters alone", ", ".join(variables),
            advice="batch statistics and other state are not trained here",
        )  # fmt: skip
    shape = getattr(features, "shape", None)
    is_matrix = shape is not None and len(shape) == 2 and shape[0] == 3
    if not is_matrix or not jnp.issubdtype(features.dtype, jnp.floating):
        got = type(features).__name__ if shape is None else f"{features.dtype} {list(shape)}"
        raise FieldError(name, "return features, float [batch, width]", f"{got} for a batch of 3")
