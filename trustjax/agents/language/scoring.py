"""The training pass: what a model says of answers that are given."""

from typing import Any

import jax
import jax.numpy as jnp

from trustjax.agents.algorithm import PyTree
from trustjax.envs.language import check_padded_left
from trustjax.losses import TokenStatistics, token_statistics
from trustjax.models import Decoder


def answer_statistics(
    model: Decoder,
    params: PyTree,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    chunk: int = 4096,
) -> TokenStatistics:
    r"""Log-probabilities of the tokens of answers, and the entropy where each was drawn.

    .. math:: \log\pi(y_t | x, y_{<t}), \qquad \pi = \mathrm{softmax}(z / T)

    Args:
      model: The language model.
      params: Its parameters.
      prompts: Tokens x, int [rows, before], padded on the left.
      prompt_mask: True on the tokens of the prompts, [rows, before].
      tokens: Tokens y of the answers, int [rows, time], padded on the right.
      mask: True on the tokens of the answers, [rows, time].
      temperature: Temperature T, > 0.
      chunk: Entries of the vocabulary whose logits are computed at a time.

    Returns:
      Statistics [rows, time] in float32 at least, 0 outside the mask.

    Raises:
      ValueError: A prompt is not padded on the left; a traced mask is not looked at.
    """
    check_padded_left("prompt_mask", prompt_mask)
    before = prompts.shape[1]
    both = jnp.concatenate([prompts, tokens], 1)
    segments = jnp.concatenate([prompt_mask != 0, mask != 0], 1).astype(jnp.int32)
    hidden: Any = model.apply({"params": params}, both, segments=segments, method="hidden")
    # The place before a token is the one that predicts it.
    hidden = hidden[:, before - 1 : -1]
    scaled = hidden / jnp.asarray(temperature, hidden.dtype)
    head = model.head_matrix(params)
    return token_statistics(scaled, head, tokens, chunk=chunk, where=mask != 0)


def fine_tuning_loss(
    model: Decoder,
    params: PyTree,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = 4096,
) -> jax.Array:
    r"""Mean negative log-likelihood of given answers per token, in nats: supervised fine-tuning.

    .. math:: -\frac{1}{\sum_{it} m_{it}} \sum_{it} m_{it} \log\pi(y_{it} | x_i, y_{i,<t})

    Args:
      model, params, prompts, prompt_mask, tokens, mask, chunk: As in `answer_statistics`.

    Returns:
      The loss, float32 [].

    Raises:
      ValueError: A prompt is not padded on the left; a traced mask is not looked at.
    """
    found = answer_statistics(model, params, prompts, prompt_mask, tokens, mask, chunk=chunk)
    return -jnp.sum(found.log_probs) / jnp.maximum(jnp.sum(mask != 0), 1)
