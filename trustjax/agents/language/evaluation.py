"""Evaluating a language policy on prompts that it may not have seen."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_count
from trustjax.agents.algorithm import PyTree
from trustjax.agents.language.answers import Answers
from trustjax.agents.language.config import Config
from trustjax.agents.language.sampling import answered
from trustjax.envs.language import Prompts


class Evaluation(NamedTuple):
    """Answers to prompts, and what the reward says of them.

    Attributes:
      tokens: Tokens of the answers, int32 [prompts, n, time].
      mask: True up to the token that ends an answer, bool [prompts, n, time].
      rewards: Rewards, float32 [prompts, n].
      levels: Levels from 1, right, to 4, int32 [prompts, n].
      thinking: Rewards of the reasoning, float32 [prompts, n].
    """

    tokens: jax.Array
    mask: jax.Array
    rewards: jax.Array
    levels: jax.Array
    thinking: jax.Array


def evaluate(
    config: Config,
    params: PyTree,
    key: jax.Array,
    prompts: Prompts,
    *,
    num_samples: int,
    deterministic: bool,
) -> Evaluation:
    """Answers to all of these prompts, `num_samples` to each, scored by the configured reward."""
    check_count("num_samples", num_samples, at_least=1)
    if deterministic and num_samples != 1:
        raise FieldError("num_samples", "be 1 without randomness", num_samples)
    temperature = 0.0 if deterministic else config.temperature
    config = dataclasses.replace(config, num_samples=num_samples, temperature=temperature)
    found: Answers = answered(config, params, prompts, key)
    return Evaluation(found.tokens, found.mask, found.rewards, found.levels, found.thinking)


def pass_at_k(levels: jax.Array, k: int) -> jax.Array:
    r"""The chance that one of k answers is right, estimated without bias from n >= k answers.

    .. math:: 1 - \binom{n - c}{k} \Big/ \binom{n}{k}, \qquad c = \text{number of right answers}

    Args:
      levels: Levels of the answers, int [prompts, n].
      k: Number of tries, 1 to n.

    Returns:
      Chances, float32 [prompts].

    Raises:
      ValueError: `k` is out of range.

    Source: Chen et al., arXiv:2107.03374, Eq. 1.

    >>> import jax.numpy as jnp
    >>> print(pass_at_k(jnp.array([[1, 2, 2, 2], [2, 2, 2, 2]]), 2).round(3))
    [0.5 0. ]
    """
    size = jnp.shape(levels)[-1]
    check_count("k", k, at_least=1)
    if k > size:
        raise FieldError("k", f"be <= {size}, the number of answers", k)
    wrong = jnp.sum(levels != 1, -1).astype(jnp.float32)
    # The ratio of binomials is the product of 1 - c / (n - i) over the k tries. Its logarithm is a
    # sum of small numbers, where those of the binomials are differences of large ones.
    enough = wrong >= k  # fewer than k wrong answers leave no way to miss
    right = jnp.where(enough, size - wrong, 0.0)
    missed = jnp.sum(jnp.log1p(-right[..., None] / (size - jnp.arange(k))), -1)
    return jnp.where(enough, -jnp.expm1(missed), 1.0)
