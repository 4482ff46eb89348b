"""Language policies on eight simulated devices and with LoRA: one iteration equals one device's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.agents.language import Config
from trustjax.envs.language import Prompts, host_reward
from trustjax.models import Decoder
from trustjax.parallel import fully_sharded, make_mesh

MODEL = Decoder(vocab_size=16, width=16, depth=1, num_heads=2, mlp_width=16)
TOKENS = jnp.arange(32).reshape(16, 2) % 16
EVEN = host_reward(
    lambda facts, text: (1 if float(text) > facts / 10 else 2, float(text)),
    lambda tokens: str(np.mean(tokens % 2 == 0)),
)
CONFIG = Config(
    model=MODEL,
    prompts=Prompts(TOKENS, jnp.ones_like(TOKENS, bool), jnp.arange(16) % 8),
    reward=EVEN,
    num_updates=2,
    num_prompts=16,
    num_samples=2,
    max_new_tokens=3,
    stop_tokens=(1,),
    num_minibatches=2,
    learning_rate=0.01,
)


@pytest.fixture(scope="module")
def base() -> Any:
    return jax.jit(MODEL.init)(jax.random.key(5), TOKENS[:1])["params"]


def after_one(config: Config, **keys: Any) -> Any:
    """The state after one iteration. Parameters are an argument, not a constant of the program."""
    state = jax.jit(lambda config: config.agent().init(jax.random.key(0)))(config)
    step = jax.jit(lambda config, state: config.agent().update(state))
    return step(config, state)


@pytest.fixture(scope="module")
def alone(base: Any) -> Any:
    return after_one(dataclasses.replace(CONFIG, base_params=base, lora_rank=2))


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(base: Any, alone: Any) -> None:
    """Groups and parameters are split; the reward of the host sees every answer once."""
    mesh = make_mesh()
    assert mesh.size == 8
    placed = jax.device_put(base, fully_sharded(base, mesh))
    state, metrics = after_one(
        dataclasses.replace(CONFIG, base_params=placed, lora_rank=2, mesh=mesh, shard_params=True)
    )
    for name, value in alone[1].items():
        if not name.startswith("time/"):
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=2e-6, err_msg=name)
    for own, given in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(alone[0].params), strict=True
    ):
        np.testing.assert_allclose(own, given, rtol=1e-4, atol=1e-6)
    split = state.params["block_0"]["attention"]["query"]["kernel"]["a"]
    assert split.sharding.shard_shape(split.shape) == (2, 2)
    assert metrics["gradient_steps"] == 4


def test_lora_changes_nothing_at_first(base: Any, alone: Any) -> None:
    config = dataclasses.replace(CONFIG, base_params=base, lora_rank=2)
    begun = config.whole_params(config.agent().init(jax.random.key(0)).params)
    for own, given in zip(jax.tree.leaves(begun), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(own, given)
    learned = config.whole_params(alone[0].params)
    changed = {
        "/".join(key.key for key in path)
        for path, same in jax.tree.leaves_with_path(
            jax.tree.map(lambda x, y: bool(jnp.all(x == y)), learned, base)
        )
        if not same
    }
    assert changed == {f"block_0/attention/{name}/kernel" for name in ("query", "value")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_params": True}, "mesh must be given where shard_params is True, got None"),
        ({"mesh": True, "num_prompts": 8}, "num_prompts must be a multiple of 16, which the 2 "),
        ({"lora_rank": 0}, "lora_rank must be >= 1, got 0"),
        ({"lora_alpha": 0.0}, "lora_alpha must be > 0, got 0.0"),
    ],
)
def test_errors_name_the_field(changes: dict[str, Any], message: str) -> None:
    if "mesh" in changes:
        changes = {**changes, "mesh": make_mesh()}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes).validate()
