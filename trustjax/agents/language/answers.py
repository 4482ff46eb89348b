"""The groups of answers that one update learns from."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from trustjax.envs.language import Prompts


class Answers(NamedTuple):
    """Groups of answers; the n answers of a prompt stay together, also in minibatches.

    Attributes:
      prompts: The prompts, with a leading axis [prompts].
      tokens: Tokens of the answers, int32 [prompts, n, time].
      mask: True up to the token that ends an answer, bool [prompts, n, time].
      stopped: Whether an answer has ended by itself, bool [prompts, n].
      sampler_log_probs: log pi_old of the tokens as they were drawn, float32 [prompts, n, time].
      old_log_probs: The same as the training pass computes it; it may differ by rounding.
      reference_log_probs: log pi_ref of the tokens; zeros if nothing needs a reference.
      rewards: Rewards, float32 [prompts, n].
      levels: Levels from 1, right, to 4, int32 [prompts, n].
      thinking: Rewards of the reasoning in [0, 1], float32 [prompts, n].
      seconds: Time on the host that each reward took, float32 [prompts, n].
      advantages: Advantages, float32 [prompts, n].
      progress: Share of the training that is done, float32 [].
    """

    prompts: Prompts
    tokens: jax.Array
    mask: jax.Array
    stopped: jax.Array
    sampler_log_probs: jax.Array
    old_log_probs: jax.Array
    reference_log_probs: jax.Array
    rewards: jax.Array
    levels: jax.Array
    thinking: jax.Array
    seconds: jax.Array
    advantages: jax.Array
    progress: jax.Array

    @property
    def group_ids(self) -> jax.Array:
        """The number of the prompt of each answer, int32 [prompts * n]."""
        prompts, size = self.rewards.shape
        return jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), size)

    def select(self, groups: jax.Array) -> Self:
        """The answers of these prompts, int [groups]."""
        rest = self._replace(progress=())  # type: ignore[arg-type]
        part: Self = jax.tree.map(lambda x: jnp.take(x, groups, 0), rest)
        return part._replace(progress=self.progress)


def rows(x: jax.Array) -> jax.Array:
    """[prompts, n, ...] as [prompts * n, ...], with the answers of a prompt next to each other."""
    return x.reshape(-1, *x.shape[2:])
