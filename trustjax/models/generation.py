"""Sampling from a language model with a cache of keys and values, compiled as a whole.

The prompts go through the model once (prefill), in a batch; each of their samples then goes on from
the same keys and values, one token at a time (decoding), until all have stopped.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_count, check_number, is_concrete_number
from trustjax.models._blocks import check_tokens
from trustjax.models.transformer import Decoder, KVCache

PyTree = Any


class Generation(NamedTuple):
    """Sampled answers. The samples of a prompt are next to each other.

    Attributes:
      tokens: Tokens, int32 [batch * num_samples, max_new_tokens]; `pad_token` after a stop token.
      mask: Whether a token belongs to the answer, bool, same shape. The stop token does.
      log_probs: log pi of the tokens, float32, same shape, 0 outside the mask: of the softmax at
        the temperature, before top-k, top-p and min-p; at temperature 1 for temperature 0.
      stopped: Whether the answer ends with a stop token, bool [batch * num_samples].
    """

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array
    stopped: jax.Array


def generate(
    model: Decoder,
    params: PyTree,
    prompts: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    prompt_mask: jax.Array | None = None,
    num_samples: int = 1,
    temperature: jax.typing.ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: jax.typing.ArrayLike | None = None,
    min_p: jax.typing.ArrayLike | None = None,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
) -> Generation:
    r"""Samples answers to prompts.

    .. math:: x_t \sim \mathrm{softmax}(z_t / T)

    The filters apply one after the other, each to the distribution that the one before leaves:
    `top_k`, `top_p` and `min_p`. Tokens as likely as the last one that a filter keeps are kept.

    Every sample has a random key of its own, so that it does not depend on the batch it is in. The
    function is compiled once per shape and set of static arguments, and can be called within a
    compiled function. Under `jax.jit`, prompts whose rows are split over a mesh give answers that
    are split likewise.

    Args:
      model: The language model.
      params: Its parameters.
      prompts: Tokens, int [batch, time], padded on either side.
      key: Random key.
      max_new_tokens: Largest number of tokens of an answer, >= 1; static.
      prompt_mask: True or nonzero on the tokens of the prompts, [batch, time], at least one in a
        row; None for no padding.
      num_samples: Answers per prompt, >= 1; static.
      temperature: Temperature T >= 0. At 0 the likeliest token is taken.
      top_k: How many of the likeliest tokens to keep, >= 1; static. None keeps all.
      top_p: Keep the fewest likeliest tokens whose probability reaches this, in (0, 1]. Without
        `top_k` it sorts the whole vocabulary at every step.
      min_p: Keep tokens that are at least this times as likely as the likeliest, in [0, 1].
      stop_tokens: Tokens that end an answer; static.
      pad_token: What follows the end of an answer; static.

    Returns:
      `Generation`.

    Raises:
      ValueError: The shapes do not fit, a number is out of range, or the model has too few learned
        positions for the prompts and their answers.

    Source: top-k: Fan et al., arXiv:1805.04833; top-p: Holtzman et al., arXiv:1904.09751; min-p:
    Nguyen et al., arXiv:2407.01082. The order of the filters is that of `transformers`.
    """
    check_tokens(None, prompts=prompts)
    if prompt_mask is None:
        prompt_mask = jnp.ones(jnp.shape(prompts), bool)
    if jnp.shape(prompt_mask) != jnp.shape(prompts):
        raise FieldError(
            "prompt_mask", f"have the shape of prompts, {prompts.shape}", prompt_mask.shape
        )
    check_count("max_new_tokens", max_new_tokens, at_least=1)
    check_count("num_samples", num_samples, at_least=1)
    check_count("top_k", top_k, at_least=1)
    check_number("temperature", temperature, at_least=0.0)
    check_number("top_p", top_p, above=0.0, at_most=1.0)
    check_number("min_p", min_p, at_least=0.0, at_most=1.0)
    needed = prompts.shape[1] + max_new_tokens
    if model.positions == "learned" and needed > model.max_length:
        raise FieldError(
            "max_new_tokens",
            f"be <= {model.max_length - prompts.shape[1]}, the positions that the prompts leave",
            max_new_tokens,
        )
    # Where it is known before compilation that nothing is random, no random numbers are drawn.
    greedy = is_concrete_number(temperature) and temperature == 0
    found: Generation = _generate(
        model, params, prompts, prompt_mask, key, None if greedy else temperature, top_p, min_p,
        max_new_tokens=max_new_tokens, num_samples=num_samples, top_k=top_k,
        stop_tokens=tuple(stop_tokens), pad_token=pad_token,
    )  # fmt: skip
    return found


class _State(NamedTuple):
    """What decoding carries from token to token; arrays of rows [batch * num_samples, ...]."""

    step: jax.Array
    cache: KVCache
    token: jax.Array
    done: jax.Array
    answers: Generation


@partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "num_samples", "top_k", "stop_tokens", "pad_token"),
)
def _generate(
    model: Decoder,
    params: PyTree,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array | None,
    min_p: jax.Array | None,
    *,
    max_new_tokens: int,
    num_samples: int,
    top_k: int | None,
    stop_tokens: tuple[int, ...],
    pad_token: int,
) -> Generation:
    batch, time = prompts.shape
    rows = batch * num_samples
    segments = (prompt_mask != 0).astype(jnp.int32)
    cache = model.init_cache(batch, time)
    apply: Callable[..., Any] = partial(model.apply, {"params": params})
    hidden, cache = apply(prompts, segments=segments, cache=cache, method="hidden")
    # Only the last token of a prompt predicts; the other logits are never computed.
    last = time - 1 - jnp.argmax(segments[:, ::-1], 1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]
    logits = apply(hidden, method="logits")
    logits = jnp.repeat(logits, num_samples, 0)
    cache = cache.repeat(num_samples).grown(max_new_tokens)
    keys = jax.random.split(key, rows)
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def drawn(state: _State, logits: jax.Array) -> _State:
        """The state after one more token of every answer that goes on."""
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        token, log_prob = _sampled(step_keys, logits, temperature, top_k, top_p, min_p)
        going = ~state.done
        token = jnp.where(going, token, pad_token)
        stop = going & jnp.any(token[:, None] == stops, -1)
        found = Generation(token, going, jnp.where(going, log_prob, 0.0), state.answers.stopped)
        tokens, mask, log_probs = (
            jax.lax.dynamic_update_slice_in_dim(column, new[:, None], state.step, 1)
            for column, new in zip(state.answers[:3], found[:3], strict=True)
        )
        answers = Generation(tokens, mask, log_probs, state.answers.stopped | stop)
        return _State(state.step + 1, state.cache, token, state.done | stop, answers)

    def going_on(state: _State) -> jax.Array:
        below = state.step < max_new_tokens
        # Devices that share the rows would wait for each other to ask what is known to be false.
        return below & ~_all_of_all_lanes(state.done) if stop_tokens else below

    def decode(state: _State) -> _State:
        # A row that has stopped attends to padding, and nobody reads what it computes.
        segments = (~state.done).astype(jnp.int32)[:, None]
        logits, cache = apply(state.token[:, None], segments=segments, cache=state.cache)
        return drawn(state._replace(cache=cache), logits[:, 0])

    shape = (rows, max_new_tokens)
    nothing = Generation(
        tokens=jnp.full(shape, pad_token, jnp.int32),
        mask=jnp.zeros(shape, bool),
        log_probs=jnp.zeros(shape, jnp.float32),
        stopped=jnp.zeros(rows, bool),
    )
    done = jnp.zeros(rows, bool)
    state = _State(jnp.int32(0), cache, jnp.zeros(rows, jnp.int32), done, nothing)
    return jax.lax.while_loop(going_on, decode, drawn(state, logits)).answers


@jax.custom_batching.custom_vmap
def _all_of_all_lanes(done: jax.Array) -> jax.Array:
    """Whether all are done, [], and in all lanes of `jax.vmap`.

    A loop whose condition differs between lanes would choose between the old and the new caches of
    every lane at every token, which takes more time than the token itself.
    """
    return jnp.all(done)


@_all_of_all_lanes.def_vmap
def _(axis_size: int, in_batched: list[bool], done: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _all_of_all_lanes(done), False


def _sampled(
    keys: jax.Array,
    logits: jax.Array,
    temperature: jax.Array | None,
    top_k: int | None,
    top_p: jax.Array | None,
    min_p: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """A token of every row of logits [rows, vocab], and its log-probability without the filters.

    Without a temperature it is the likeliest.
    """
    if temperature is None:
        token = jnp.argmax(logits, -1)
        log_prob = jnp.max(logits, -1) - jax.nn.logsumexp(logits, -1)
        return token.astype(jnp.int32), log_prob
    greedy = jnp.asarray(temperature, logits.dtype) == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature).astype(logits.dtype)
    kept, tokens = scaled, None
    if top_k is not None and top_k < logits.shape[-1]:
        # Samples are drawn among the candidates, which come in descending order.
        kept, tokens = jax.lax.top_k(scaled, top_k)
    if top_p is not None:
        kept = _nucleus(kept, jnp.asarray(top_p, kept.dtype), in_order=tokens is not None)
    if min_p is not None:
        lowest = jnp.max(kept, -1, keepdims=True) + jnp.log(jnp.asarray(min_p, kept.dtype))
        kept = jnp.where(kept >= lowest, kept, -jnp.inf)
    choice = jnp.where(greedy, jnp.argmax(kept, -1), _drawn(keys, kept))[:, None]
    token = choice if tokens is None else jnp.take_along_axis(tokens, choice, -1)
    log_prob = jnp.take_along_axis(scaled, token, -1)[:, 0] - jax.nn.logsumexp(scaled, -1)
    return token[:, 0].astype(jnp.int32), log_prob


def _drawn(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """A place of every row of logits [rows, places], drawn from the softmax.

    First one of about sqrt(places) groups of neighbours is drawn, and then one of its places: two
    draws among few take far fewer random numbers than one among all, and the product of the two
    probabilities is that of the softmax.
    """
    rows, places = logits.shape
    size = math.isqrt(places - 1) + 1
    groups = -(-places // size)
    missing = ((0, 0), (0, groups * size - places))
    grouped = jnp.pad(logits, missing, constant_values=-jnp.inf).reshape(rows, groups, size)
    keys = jax.vmap(jax.random.split)(keys)
    draw = jax.vmap(jax.random.categorical)
    group = draw(keys[:, 0], jax.nn.logsumexp(grouped, -1))
    within = jnp.take_along_axis(grouped, group[:, None, None], 1)[:, 0]
    return group * size + draw(keys[:, 1], within)


def _nucleus(logits: jax.Array, top_p: jax.Array, *, in_order: bool) -> jax.Array:
    """The logits, -inf outside of the fewest tokens whose probability reaches `top_p`."""
    descending = logits if in_order else -jnp.sort(-logits, -1)
    probs = jax.nn.softmax(descending, -1)
    before = jnp.cumsum(probs, -1) - probs
    lowest = jnp.min(jnp.where(before < top_p, descending, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
