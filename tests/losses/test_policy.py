"""Losses of policies against worked numbers: values, slopes, optima, and what carries none."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trustjax.distributions import Categorical, DiagonalGaussian
from trustjax.losses import (
    adapt_kl_coefficient,
    adapt_learning_rate,
    mdpo_actor_loss,
    mdpo_loss,
    ppo_clip_loss,
    ppo_kl_loss,
    sac_actor_loss,
    sac_critic_loss,
    temperature_loss,
    trpo_surrogate,
    value_loss,
)

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "policy.json").read_text(encoding="utf-8")
)
pytestmark = pytest.mark.usefixtures("x64")


def test_ppo_clip():
    golden = GOLDEN["ppo_clip"]
    log_prob, old = np.log(golden["probabilities"]), np.log(golden["old"])
    advantage = np.array(golden["advantages"], float)
    losses = ppo_clip_loss(log_prob, old, advantage, clip=golden["clip"])
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-12)
    np.testing.assert_allclose(losses.mean(), golden["mean"], rtol=1e-12)
    np.testing.assert_allclose(
        trpo_surrogate(log_prob, old, advantage), golden["ratios"] * advantage, rtol=1e-12
    )
    gradient = jax.grad(lambda x: ppo_clip_loss(x, old, advantage).mean())(log_prob)
    np.testing.assert_allclose(gradient, golden["gradient"], rtol=1e-12)


def test_value_clip():
    golden = GOLDEN["value"]
    values, old, returns = (np.array(golden[k], float) for k in ("values", "old", "returns"))
    losses = value_loss(values, old, returns, clip=golden["clip"])
    np.testing.assert_allclose(losses.mean(), golden["mean"], rtol=1e-12)
    np.testing.assert_allclose(value_loss(values, old, returns), (values - returns) ** 2)


def test_adaptive_kl():
    golden = GOLDEN["kl_coefficient"]
    for kl, expected in golden["cases"]:
        found = adapt_kl_coefficient(jnp.ones([]), jnp.asarray(kl), golden["target"])
        assert found == expected


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_adaptive_kl_comes_back(kl):
    """Many iterations to one side, such as those after an annealed rate has reached 0."""
    found = jax.lax.fori_loop(
        0, 3000, lambda _, x: adapt_kl_coefficient(x, jnp.asarray(kl), 0.01), jnp.ones([])
    )
    assert 0 < found < np.inf
    back = adapt_kl_coefficient(found, jnp.asarray(1 - kl), 0.01)
    assert back == (2 * found if kl == 0 else found / 2)


@pytest.mark.parametrize(
    ("rate", "kl", "expected"),
    [
        (3e-3, 0.021, 2e-3),  # above 2 d: divided by 1.5
        (3e-3, 0.019, 3e-3),
        (3e-3, 0.006, 3e-3),
        (3e-3, 0.004, 4.5e-3),  # below d / 2: multiplied by 1.5
        (3e-3, 0.0, 3e-3),  # the first minibatch, where the policy is still the old one
        (1.2e-5, 1.0, 1e-5),  # the bounds
        (9e-3, 1e-6, 1e-2),
        (3e-3, np.nan, 3e-3),
        (3e-3, np.inf, 2e-3),
    ],
)
def test_adaptive_learning_rate(rate, kl, expected):
    """By hand, at d = 0.01."""
    found = adapt_learning_rate(jnp.asarray(rate), jnp.asarray(kl), 0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


class TestMDPO:
    """The example with three actions."""

    golden = GOLDEN["mdpo"]
    old = np.array(golden["old"], float)
    actions = np.array(golden["actions"])
    advantage = np.array(golden["advantages"])

    def parts(self, logits, old):
        policy = Categorical(jnp.broadcast_to(logits, (4, 3)))
        before = Categorical(jnp.broadcast_to(old, (4, 3)))
        return policy, before, policy.log_prob(self.actions), before.log_prob(self.actions)

    def mdpo(self, logits, old, step_size=0.5):
        policy, before, log_prob, old_log_prob = self.parts(logits, old)
        kl = policy.kl_divergence(before)
        return mdpo_loss(log_prob, old_log_prob, self.advantage, kl, step_size=step_size).mean()

    def ppo(self, logits, old):
        policy, before, log_prob, old_log_prob = self.parts(logits, old)
        kl = before.kl_divergence(policy)
        return ppo_kl_loss(log_prob, old_log_prob, self.advantage, kl, coefficient=2.0).mean()

    def test_values_and_slopes(self):
        golden, logits = self.golden, np.array(self.golden["logits"])

        @jax.jit
        def numbers(logits, old):
            policy, before, log_prob, old_log_prob = self.parts(logits, old)
            loss, gradient = jax.value_and_grad(self.mdpo)(logits, old)
            ppo_loss, ppo_gradient = jax.value_and_grad(self.ppo)(logits, old)
            return {
                "probabilities": jax.nn.softmax(policy.logits)[0],
                "surrogate": trpo_surrogate(log_prob, old_log_prob, self.advantage).mean(),
                "kl_new_old": policy.kl_divergence(before),
                "kl_old_new": before.kl_divergence(policy),
                "loss": loss,
                "gradient": gradient,
                "ppo_loss": ppo_loss,
                "ppo_gradient": ppo_gradient,
            }

        for name, found in numbers(logits, self.old).items():
            rtol = 1e-8 if "gradient" in name or "kl" in name else 1e-9
            np.testing.assert_allclose(found, golden[name], rtol=rtol)

    def test_one_step_is_policy_gradient(self):
        """At the old policy the step size does not matter: m = 1 is the vanilla gradient."""

        def vanilla(logits, old):
            _, _, log_prob, _ = self.parts(logits, old)
            return -jnp.mean(log_prob * self.advantage)

        @jax.jit
        def gradients(at, step_sizes):
            mdpo = jax.vmap(jax.grad(self.mdpo), (None, None, 0))(at, at, step_sizes)
            return *mdpo, jax.grad(vanilla)(at, at), jax.grad(self.ppo)(at, at)

        found = gradients(self.old, np.array([0.01, 0.5, 1e6]))
        assert len(found) == 5
        for gradient in found:
            np.testing.assert_allclose(gradient, self.golden["gradient_at_old"], atol=1e-12)

    def test_inner_steps_and_optimum(self):
        golden = self.golden["descent"]
        logits, losses = np.asarray(self.old), []
        value_and_gradient = jax.jit(jax.value_and_grad(self.mdpo))
        for _ in range(3):
            loss, gradient = value_and_gradient(logits, self.old)
            losses.append(loss)
            logits = logits - golden["rate"] * np.asarray(gradient)
        losses.append(value_and_gradient(logits, self.old)[0])
        np.testing.assert_allclose(losses, golden["losses"], rtol=1e-9)
        np.testing.assert_allclose(logits, golden["logits"], rtol=1e-6)
        optimum = self.golden["optimum"]

        def step(logits, _):
            return logits - 2.0 * jax.grad(self.mdpo)(logits, self.old), None

        descended = jax.jit(lambda x: jax.nn.softmax(jax.lax.scan(step, x, length=500)[0]))
        found = descended(logits)
        np.testing.assert_allclose(found, optimum["probabilities"], rtol=1e-7)
        weights = 0.5 * np.array(optimum["weights"])  # t w, with pi_k uniform
        np.testing.assert_allclose(found, jax.nn.softmax(weights), rtol=1e-9)

    def test_gaussian(self):
        golden = GOLDEN["mdpo_gaussian"]
        actions = np.array(golden["actions"], float)[:, None]

        def gaussian(mean, log_std):
            return DiagonalGaussian(jnp.full((2, 1), mean), jnp.full((2, 1), log_std))

        before = gaussian(golden["old_mean"], np.log(golden["old_std"]))

        def loss(mean, log_std):
            policy = gaussian(mean, log_std)
            return mdpo_loss(
                policy.log_prob(actions),
                before.log_prob(actions),
                np.array(golden["advantages"], float),
                policy.kl_divergence(before),
                step_size=golden["step_size"],
            ).mean()

        def kl(mean, log_std):
            return gaussian(mean, log_std).kl_divergence(before)[0]

        @jax.jit
        def numbers(*at):
            forward, slopes = jax.value_and_grad(kl, (0, 1))(*at)
            return loss(*at), forward, before.kl_divergence(gaussian(*at))[0], *slopes

        names = ("loss", "kl_new_old", "kl_old_new", "kl_by_mean", "kl_by_log_std")
        found = numbers(golden["mean"], np.log(golden["std"]))
        for name, number in zip(names, found, strict=True):
            rtol = 1e-8 if name in ("kl_new_old", "kl_old_new") else 1e-9
            np.testing.assert_allclose(number, golden[name], rtol=rtol)


ONES = np.ones(3)
CONSTANTS = {
    "trpo": lambda old, x: trpo_surrogate(ONES, old, x),
    "ppo_clip": lambda old, x: ppo_clip_loss(ONES, old, x),
    "ppo_kl": lambda old, x: ppo_kl_loss(ONES, old, x, ONES, coefficient=1.0),
    "mdpo": lambda old, x: mdpo_loss(ONES, old, x, ONES, step_size=1.0),
    "value": lambda old, x: value_loss(ONES, old, x, clip=0.2),
    "critic": lambda old, x: sac_critic_loss(
        ONES, old, x, ONES, ONES < 0, discount=0.9, temperature=0.1
    ),
    "temperature": lambda old, x: temperature_loss(jnp.zeros([]), old + x, target_entropy=-1.0),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_targets_carry_no_gradient(name):
    for gradient in jax.grad(lambda *args: CONSTANTS[name](*args).sum(), (0, 1))(0.9 * ONES, ONES):
        assert not np.any(gradient)


def test_narrow_inputs_and_strict_promotion(strict):
    narrow = jnp.ones(3, jnp.bfloat16)
    for loss in (
        ppo_clip_loss(narrow, narrow, narrow),
        ppo_kl_loss(narrow, narrow, narrow, narrow, coefficient=0.5),
        mdpo_loss(narrow, narrow, narrow, narrow, step_size=0.5),
        value_loss(narrow, narrow, narrow, clip=0.2),
        mdpo_actor_loss(narrow, narrow, narrow, step_size=1.0, temperature=0.1, order=1.5),
        sac_actor_loss(narrow, narrow, temperature=0.1),
        temperature_loss(narrow[0], narrow, target_entropy=-1),
    ):
        assert loss.dtype == jnp.float32
        assert loss.shape == (3,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ppo_clip_loss(ONES, ONES, ONES, clip=-0.1), "clip must be >= 0, got -0.1"),
        (lambda: mdpo_loss(ONES, ONES, ONES, ONES, step_size=0.0), "step_size must be > 0"),
        (lambda: ppo_clip_loss(ONES, ONES, ONES[:2]), r"advantage must have the shape .*\(2,\)"),
        (
            lambda: mdpo_actor_loss(ONES, ONES, ONES, step_size=1.0, temperature=0.0, order=2.5),
            "order must be <= 2",
        ),
        (lambda: temperature_loss(ONES, ONES, target_entropy=1, form="x"), "form must be one of"),
        (lambda: ppo_kl_loss(ONES, ONES, ONES, ONES, coefficient=-1), "coefficient must be >= 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_may_be_traced():
    swept = jax.vmap(lambda clip: ppo_clip_loss(ONES, 0 * ONES, ONES, clip=clip))(
        jnp.array([0.1, 0.2])
    )
    np.testing.assert_allclose(swept, -np.array([[1.1] * 3, [1.2] * 3]))
    assert optax.losses.l2_loss(swept).shape == (2, 3)
