"""Numbers of losses are numbers: an array would broadcast along an axis that fits."""

import jax
import jax.numpy as jnp
import pytest

from trustjax.losses import (
    dpo_loss,
    grpo_loss,
    mdpo_actor_loss,
    mdpo_forward_loss,
    plackett_luce_loss,
    ppo_clip_loss,
    reduce_tokens,
    sac_actor_loss,
    sac_critic_loss,
    temperature_loss,
    trpa_loss,
)

X, TOKENS, TWO = jnp.ones(3), jnp.ones((3, 3)), jnp.array([1.0, 2.0])
COLUMN = jnp.full((3, 1), 0.2)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: sac_actor_loss(X, X, temperature=COLUMN), "temperature"),
        (lambda: sac_critic_loss(X, X, X, X, X, discount=COLUMN, temperature=0.1), "discount"),
        (lambda: mdpo_actor_loss(X, X, X, step_size=COLUMN, temperature=0.1), "step_size"),
        (
            lambda: mdpo_forward_loss(X, X, X, step_size=1.0, temperature=X, drawn=True),
            "temperature",
        ),
        (lambda: temperature_loss(COLUMN, X, target_entropy=-1.0), "log_temperature"),
        (lambda: temperature_loss(jnp.zeros([]), X, target_entropy=COLUMN), "target_entropy"),
        (lambda: ppo_clip_loss(X, X, X, clip=X), "clip"),
        (lambda: dpo_loss(X, X, X, X, beta=COLUMN), "beta"),
        (lambda: plackett_luce_loss(jnp.eye(2), jnp.array([[0, 1]] * 2), temperature=TWO), "temp"),
        (
            lambda: reduce_tokens(TOKENS, TOKENS, reduction="constant", normalizer=TWO),
            "normalizer",
        ),
        (lambda: grpo_loss(TOKENS, TOKENS, X, TOKENS, clip=X), "clip"),
        (
            lambda: trpa_loss(
                TOKENS, TOKENS, TOKENS, jnp.ones(3, int), jnp.zeros(3, int), TOKENS,
                trust_coefficient=X,
            ),
            "trust_coefficient",
        ),
    ],
)  # fmt: skip
def test_an_array_in_place_of_a_number(call, field):
    for run in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=rf"^{field}\w* must be one number, got shape \("):
            run()


def test_a_weight_of_the_kl_for_each_answer_is_refused():
    """It would be taken for one for each time step where there are as many."""
    with pytest.raises(ValueError, match="beta must have the shape of the first argument"):
        grpo_loss(TOKENS, TOKENS, X, TOKENS, reference_log_probs=TOKENS, beta=jnp.arange(3.0))


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: mdpo_actor_loss(-X, -2 * X, X, step_size=1.0, temperature=w),
        lambda w: mdpo_forward_loss(-X, -jnp.arange(3.0), X, step_size=1.0, temperature=w,
                                    drawn=True),
        lambda w: sac_actor_loss(-X, X, temperature=w),
    ],
)  # fmt: skip
def test_the_temperature_of_a_policy_loss_is_a_constant(loss):
    assert jax.grad(lambda w: jnp.sum(loss(w)))(0.2) == 0
