"""Losses of replayed transitions beside numbers worked out elsewhere; see tests/golden."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.losses import (
    mdpo_actor_loss,
    mdpo_forward_loss,
    policy_mean,
    sac_actor_loss,
    sac_critic_loss,
    temperature_loss,
    tsallis_log,
)

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "policy.json").read_text(encoding="utf-8")
)
pytestmark = pytest.mark.usefixtures("x64")


class TestActionsThatAreDrawn:
    squashed = GOLDEN["squashed"]

    def actor(self, c, temperature, **options):
        return mdpo_actor_loss(
            np.array([self.squashed["log_prob"]]),
            np.array([self.squashed["old_log_prob"]]),
            np.array([GOLDEN["mdpo_actor"]["q"]]),
            step_size=1 / c,
            temperature=temperature,
            **options,
        )

    def test_kl(self):
        for c, temperature, expected in GOLDEN["mdpo_actor"]["cases"]:
            np.testing.assert_allclose(self.actor(c, temperature), [expected], rtol=1e-9)

    def test_with_the_largest_step_it_is_sac(self):
        """c = lambda: the old policy drops out, whatever it is."""
        log_prob, old, q = np.random.default_rng(0).normal(size=(3, 8))
        found = mdpo_actor_loss(log_prob, old, q, step_size=5.0, temperature=0.2)
        expected = sac_actor_loss(log_prob, q, temperature=0.2)
        np.testing.assert_allclose(found, expected, rtol=1e-12)

    def test_tsallis(self):
        golden = GOLDEN["mdpo_tsallis"]
        for order, expected in golden["cases"]:
            found = mdpo_actor_loss(
                np.array([golden["log_prob"]]),
                np.array([golden["old_log_prob"]]),
                np.array([golden["q"]]),
                step_size=1 / golden["c"],
                temperature=golden["temperature"],
                order=order,
                event_axis=-1,
            )
            np.testing.assert_allclose(found, [expected], rtol=1e-9)

    def test_orders_near_one_tend_to_kl(self):
        near = self.actor(1.0, 0.2, order=1 + 1e-9)
        np.testing.assert_allclose(near, self.actor(1.0, 0.2), rtol=1e-8)

    def test_unlikely_actions_keep_their_slope(self):
        """No clamp of the density: log-probabilities of -100 still pull."""

        def loss(log_prob):
            zero = jnp.zeros([])
            return mdpo_actor_loss(log_prob, zero, zero, step_size=1.0, temperature=0.1)

        np.testing.assert_allclose(jax.grad(loss)(-100.0), 1.0)

    def test_critic(self):
        golden = GOLDEN["mdpo_actor"]["critic_target"]

        def loss(q, terminated):
            one = jnp.ones(1)
            return sac_critic_loss(
                q * one,
                golden["reward"] * one,
                golden["next_value"] * one,
                0 * one,
                np.array([terminated]),
                discount=golden["discount"],
                temperature=0.2,
            ).sum()

        np.testing.assert_allclose(loss(golden["target"], False), 0, atol=1e-12)
        np.testing.assert_allclose(loss(golden["reward"], True), 0, atol=1e-12)
        np.testing.assert_allclose(jax.grad(loss)(4.0, False), 4.0 - golden["target"], rtol=1e-12)

    def test_shapes_do_not_broadcast(self):
        batch = jnp.ones(4)
        with pytest.raises(ValueError, match=r"next_log_prob must have the shape .*\(4, 1\)"):
            sac_critic_loss(
                *3 * [batch[:, None]], batch, batch[:, None] > 0, discount=0.9, temperature=0.2
            )
        with pytest.raises(ValueError, match="q_value"):
            sac_actor_loss(batch, batch[:, None], temperature=0.2)
        with pytest.raises(ValueError, match="q_value"):
            mdpo_actor_loss(batch, batch, batch[:, None], step_size=1.0, temperature=0.2)

    def test_temperature(self):
        golden = GOLDEN["temperature"]
        for form in ("log", "exponential"):
            loss, gradient = jax.value_and_grad(
                lambda x, form=form: temperature_loss(
                    x,
                    np.array([golden["log_prob"]]),
                    target_entropy=golden["target_entropy"],
                    form=form,
                ).sum()
            )(np.log(golden["temperature"]))
            np.testing.assert_allclose(loss, golden[form], rtol=1e-9)
            np.testing.assert_allclose(gradient, golden[f"{form}_gradient"], rtol=1e-9)


class TestChoices:
    """Of which the expectation over all actions is taken."""

    golden = GOLDEN["mdpo_tabular"]
    old = np.log(golden["old"])
    q = np.array(golden["q"], float)

    def descended(self, mean, rate=1.0, length=3000):
        def step(logits, _):
            return logits - rate * jax.grad(mean)(logits), None

        logits, _ = jax.lax.scan(step, jnp.zeros(3), length=length)
        return jax.nn.log_softmax(logits)

    def mdpo(self, logits, temperature):
        log_prob = jax.nn.log_softmax(logits)
        losses = mdpo_actor_loss(
            log_prob, self.old, self.q, step_size=1 / self.golden["c"], temperature=temperature
        )
        return policy_mean(log_prob, losses)

    @pytest.mark.parametrize("case", golden["cases"])
    def test_optimum_of_mdpo(self, case):
        """pi_k^(1 - lam/c) exp(Q/c), normalised."""
        temperature, expected, minimum = case
        log_prob = self.descended(lambda logits: self.mdpo(logits, temperature))
        np.testing.assert_allclose(jnp.exp(log_prob), expected, rtol=1e-7)
        if minimum is not None:
            np.testing.assert_allclose(self.mdpo(log_prob, temperature), minimum, rtol=1e-9)

    @pytest.mark.parametrize("case", golden["cases"])
    def test_the_forward_projection_has_the_same_optimum(self, case):
        temperature, expected, _ = case
        log_prob = self.descended(
            lambda logits: mdpo_forward_loss(
                jax.nn.log_softmax(logits), self.old, self.q,
                step_size=1 / self.golden["c"], temperature=temperature, drawn=False,
            )
        )  # fmt: skip
        np.testing.assert_allclose(jnp.exp(log_prob), expected, rtol=1e-7)

    def test_draws_stand_for_all(self):
        """Ten draws in which every action is as frequent as it is likely."""
        draws = np.array([0] * 5 + [1] * 3 + [2] * 2)
        log_prob = jax.nn.log_softmax(jnp.array([0.3, -0.2, 0.1]))
        numbers = {"step_size": 0.7, "temperature": 0.4}
        found = mdpo_forward_loss(
            log_prob[draws], self.old[draws], self.q[draws], drawn=True, **numbers
        )
        expected = mdpo_forward_loss(log_prob, self.old, self.q, drawn=False, **numbers)
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    def test_optimum_of_sac_and_its_value(self):
        """softmax(Q / lam), where the soft value is lam log sum exp(Q / lam)."""
        golden = self.golden["fixed_point"]
        temperature = golden["temperature"]

        def mean(logits):
            log_prob = jax.nn.log_softmax(logits)
            return policy_mean(log_prob, sac_actor_loss(log_prob, self.q, temperature=temperature))

        log_prob = self.descended(mean, rate=5.0, length=100_000)
        np.testing.assert_allclose(jnp.exp(log_prob), golden["probabilities"], rtol=0, atol=1e-7)
        soft = policy_mean(log_prob, self.q - temperature * log_prob)
        expected = temperature * jax.nn.logsumexp(self.q / temperature)
        np.testing.assert_allclose(soft, expected, rtol=1e-8)

    def test_actions_that_cannot_be(self):
        """They add nothing, to values and to gradients."""
        cannot = jnp.array([0.0, 0.0, -jnp.inf])

        def losses(logits):
            log_prob = jax.nn.log_softmax(logits)
            forward = mdpo_forward_loss(
                log_prob, jax.nn.log_softmax(cannot), self.q, step_size=1.0, temperature=0.1,
                drawn=False,
            )  # fmt: skip
            sac = policy_mean(log_prob, sac_actor_loss(log_prob, self.q, temperature=0.2))
            return jnp.stack([forward, sac])

        logits = cannot + jnp.array([0.5, 0.0, 0.0])
        found, slopes = losses(logits), jax.jacrev(losses)(logits)
        assert np.all(np.isfinite(found))
        assert np.all(np.isfinite(slopes))
        assert not np.any(slopes[:, 2])


def test_log_of_an_order():
    x = np.array([0.1, 1.0, 3.0])
    for order, expected in ((1.0, np.log(x)), (1.5, 2 * (x**0.5 - 1)), (2.0, x - 1)):
        np.testing.assert_allclose(tsallis_log(np.log(x), order=order), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="order must be >= 1"):
        tsallis_log(x, order=0.5)
    with pytest.raises(ValueError, match="known before compilation"):
        jax.jit(lambda order: tsallis_log(x, order=order))(1.5)


def test_forward_weights_are_constants():
    def mean(old, q):
        ones = jnp.zeros(3)
        return mdpo_forward_loss(ones, old, q, step_size=1.0, temperature=0.5, drawn=True)

    for gradient in jax.grad(mean, (0, 1))(jnp.arange(3.0), jnp.arange(3.0)):
        assert not np.any(gradient)
