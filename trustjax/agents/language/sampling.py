"""Drawing prompts and groups of answers, and drawing again where all answers are alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trustjax.agents.algorithm import PyTree
from trustjax.agents.language.answers import Answers
from trustjax.agents.language.config import Config
from trustjax.envs.language import Prompts
from trustjax.losses import informative_groups
from trustjax.models import generate
from trustjax.parallel import replicated


class Drawn(NamedTuple):
    """The groups of an iteration.

    Attributes:
      answers: Groups of answers with their rewards; what the training computes is still 0.
      rounds: How often prompts were drawn, int32 [].
      informative: Share of the groups drawn first whose rewards differ, float32 [].
      tokens: Number of tokens that were sampled in all rounds, float32 [].
    """

    answers: Answers
    rounds: jax.Array
    informative: jax.Array
    tokens: jax.Array


def answered(config: Config, params: PyTree, prompts: Prompts, key: jax.Array) -> Answers:
    """`num_samples` answers to each of these prompts, with their rewards."""
    count, size = prompts.tokens.shape[0], config.num_samples
    params = config.whole_params(params)
    if config.mesh is not None:
        # Once for all tokens: in the loop, every token would wait for all devices' parts.
        params = jax.lax.with_sharding_constraint(params, replicated(config.mesh))
    found = generate(
        config.model, params, prompts.tokens, key,
        prompt_mask=prompts.mask, num_samples=size, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, stop_tokens=config.stop_tokens,
        pad_token=config.pad_token,
    )  # fmt: skip
    facts = jax.tree.map(lambda x: jnp.repeat(x, size, 0), prompts.facts)
    rewards = config.reward(facts, found.tokens, found.mask)

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(count, size, *x.shape[1:])

    log_probs, reward = grouped(found.log_probs), grouped(rewards.reward)
    return Answers(
        prompts=prompts,
        tokens=grouped(found.tokens),
        mask=grouped(found.mask),
        stopped=grouped(found.stopped),
        sampler_log_probs=log_probs,
        old_log_probs=log_probs,
        reference_log_probs=jnp.zeros_like(log_probs),
        rewards=reward,
        levels=grouped(rewards.level),
        thinking=grouped(rewards.thinking),
        seconds=grouped(rewards.seconds),
        advantages=jnp.zeros_like(reward),
        progress=jnp.zeros([]),
    )


def draw(config: Config, params: PyTree, key: jax.Array) -> Drawn:
    """The groups of one iteration, by dynamic sampling if there are several rounds.

    Yu et al., DAPO, arXiv:2503.14476, Eq. 11: groups whose answers all have the same reward have no
    advantages. Each round draws as many prompts as there are groups; those with a difference
    take the places of those without. It ends when all places hold one, or after the last round.
    """
    number = config.num_prompts

    def round_of(key: jax.Array) -> Answers:
        key_prompts, key_answers = jax.random.split(key)
        total = len(config.prompts.tokens)
        # Without replacement as far as there are prompts, so that no prompt counts twice.
        chosen = jax.random.choice(key_prompts, total, (number,), replace=number > total)
        prompts = config.shared_out(config.prompts.take(chosen))
        return answered(config, params, prompts, key_answers)

    def going_on(drawn: Drawn) -> jax.Array:
        return (drawn.rounds < config.sampling_rounds) & ~jnp.all(_useful(drawn.answers))

    def again(drawn: Drawn) -> Drawn:
        new = round_of(jax.random.fold_in(key, drawn.rounds))
        # A stable sort: groups with a difference first, then the latest of the others.
        both = jax.tree.map(lambda *x: jnp.concatenate(x), _groups(new), _groups(drawn.answers))
        kept = jnp.argsort(~_useful(both), stable=True)[:number]
        share = jnp.mean(_useful(new), dtype=jnp.float32)
        return Drawn(
            both._replace(progress=new.progress).select(kept),
            drawn.rounds + 1,
            jnp.where(drawn.rounds == 0, share, drawn.informative),
            drawn.tokens + jnp.sum(new.mask, dtype=jnp.float32),
        )

    # Before the first round all places hold groups of zeros, which any other group replaces.
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(round_of, key))
    start = Drawn(nothing, jnp.int32(0), jnp.zeros([]), jnp.zeros([]))
    return (
        again(start) if config.sampling_rounds == 1 else jax.lax.while_loop(going_on, again, start)
    )


def _groups(answers: Answers) -> Answers:
    """The answers without what has no axis of prompts."""
    return answers._replace(progress=())  # type: ignore[arg-type]


def _useful(answers: Answers) -> jax.Array:
    """Which groups have answers with different rewards, bool [prompts]."""
    return informative_groups(answers.rewards)[:, 0]
