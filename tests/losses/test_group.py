"""Losses of group-based language policies: worked examples, far ratios, masks, sharding."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.losses import (
    cispo_loss,
    dapo_loss,
    divergence_mask,
    dr_grpo_loss,
    gmpo_loss,
    grpo_loss,
    gspo_loss,
    informative_groups,
    kl_estimate,
    luspo_loss,
    masked_mean,
    reduce_tokens,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_loss,
    rloo_loss,
    sapo_loss,
    soft_overlong_penalty,
    trust_grpo_advantages,
    trust_metrics,
    trust_weight,
    vespo_loss,
)

LOSSES = {
    "grpo": grpo_loss,
    "dr_grpo": dr_grpo_loss,
    "dapo": dapo_loss,
    "reinforce_plus_plus": reinforce_plus_plus_loss,
    "gspo": gspo_loss,
    "gspo_token": functools.partial(gspo_loss, level="token"),
    "rloo": rloo_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "gmpo": gmpo_loss,
    "vespo": vespo_loss,
    "luspo": luspo_loss,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

# The fact sheet on the GRPO family, section 6.4: NumPy in float64.
NEW = np.array([[-1, -0.5, -2], [-0.7, -1.2, 0]])
OLD = np.array([[-1.2, -0.4, -2.5], [-0.7, -0.9, 0]])
REFERENCE = np.array([[-1.1, -0.6, -2.2], [-0.8, -1, 0]])
MASK = np.array([[1, 1, 1], [1, 1, 0]])
ADVANTAGES = np.array([1.0, -1.0])


def test_worked_losses(x64):
    cases = (
        (-0.30096748360719, grpo_loss, {"reduction": "token_mean"}),
        (-0.10080623633933, grpo_loss, {}),
        (-0.75241870901798, grpo_loss, {"reduction": "sequence_sum"}),
        (-0.50161247267865, grpo_loss, {"reduction": "constant", "normalizer": 3}),
        (-0.25080623633933, dr_grpo_loss, {}),
        (-0.32124803523922, dapo_loss, {}),
        (-0.11770669603269, dapo_loss, {"reduction": "sequence_mean"}),
        (-0.00035, gspo_loss, {}),
        (-0.16964601178747, gspo_loss, {"clip": 0.2, "clip_high": 0.2}),
        (-0.16964601178747, gspo_loss, {"clip": 0.2, "clip_high": 0.2, "level": "token"}),
    )
    losses = jax.jit(lambda *given: [loss(*given, **numbers) for _, loss, numbers in cases])
    expected = [row[0] for row in cases]
    np.testing.assert_allclose(losses(NEW, OLD, ADVANTAGES, MASK), expected, rtol=1e-11)

    @jax.jit
    def means(new, reference):
        each = [kl_estimate(new, reference, kind) for kind in ("k1", "k2", "k3")]
        by_answer = functools.partial(reduce_tokens, mask=MASK, reduction="sequence_mean")
        return [masked_mean(x, MASK) for x in each], [by_answer(x) for x in each]

    token, sequence = means(NEW, REFERENCE)
    np.testing.assert_allclose(token, [0.06, 0.011, 0.01092915306921], rtol=1e-11)
    np.testing.assert_allclose(sequence, [0.04166666666667, 0.01125, 0.01129430890735], rtol=1e-11)


def test_rloo_of_worked_numbers(x64):
    """R is e^0.6 and e^-0.3; with A = 1 and -1, clips narrower than these act on both sides."""
    found = functools.partial(rloo_loss, NEW, OLD, ADVANTAGES, MASK)
    high, low = np.exp(0.6), np.exp(-0.3)
    for numbers, losses in (
        ({}, (-1.2, 0.8)),
        ({"clip": 0.1}, (-1.1, 0.9)),
        ({"clip": 0.1, "clip_high": 0.5}, (-1.5, 0.9)),
        ({"clip": 0.5, "clip_high": 1.0}, (-high, low)),
    ):
        np.testing.assert_allclose(found(**numbers), np.mean(losses), rtol=1e-12)
    plain = rloo_loss(NEW, None, ADVANTAGES, MASK)
    np.testing.assert_allclose(plain, (3.5 - 1.9) / 2, rtol=1e-12)
    with pytest.raises(ValueError, match=r"^clip must be None"):
        rloo_loss(NEW, None, ADVANTAGES, MASK, clip=0.2)


def test_worked_trust_grpo(x64):
    outcome, thinking = np.array([1.0, 0, 0, 1]), np.array([0.2, 0.8, 0.9, 0.4])
    weight = jax.jit(trust_weight)(outcome, thinking)
    np.testing.assert_allclose(weight, 0.5769498103804866, rtol=1e-14)
    advantages = jax.jit(
        functools.partial(trust_grpo_advantages, total_steps=1500), static_argnames=("ddof", "form")
    )
    for step, expected in (
        (0, [0.832509705442, -0.882186962906, -0.849068791263, 0.898746048727]),
        (750, [0.846594963139, -0.875536719288, -0.856242215189, 0.885183971337]),
        (1500, [0.854548380203, -0.871690888921, -0.860262549776, 0.877405058494]),
    ):
        np.testing.assert_allclose(advantages(outcome, thinking, step=step), expected, rtol=1e-10)
    found = advantages(outcome, thinking, step=0, ddof=0)
    np.testing.assert_allclose(
        found, [0.96129912053, -1.01866145949, -0.980419900184, 1.037782239143], rtol=1e-10
    )
    found = advantages(outcome, thinking, step=0, form="code")
    np.testing.assert_allclose(
        found, [0.81773377253, -0.865368749571, -0.865368749571, 0.913003726612], rtol=1e-10
    )
    soft = np.array([0.8, 0.4, 0.3, 0.6])
    found = advantages(soft, thinking, step=750)
    np.testing.assert_allclose(
        found, [1.256853571477, -0.540753421783, -1.018153521579, 0.302053371885], rtol=1e-10
    )
    assert not np.any(advantages(np.ones(4), thinking, step=0, form="code"))


def test_worked_rewards(x64):
    rewards, mask = np.array([[0, 0, 1, 0], [0, 0, 0, -1.0]]), np.array([[1, 1, 1, 0], [1] * 4])
    expected = np.array([[1.069044962973] * 3 + [0], [-0.801783722229] * 4])
    found = jax.jit(reinforce_plus_plus_advantages)(rewards, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    penalty = functools.partial(soft_overlong_penalty, jnp.array([21000.0, 18432, 100]))
    np.testing.assert_allclose(penalty(bounded=False), [-1.126953125, -0.5, 0])
    np.testing.assert_allclose(penalty(), [-1, -0.5, 0])
    groups = jnp.array([[1.0, 1, 1], [0, 1, 1]])
    assert informative_groups(groups).tolist() == [[False] * 3, [True] * 3]


@pytest.mark.table
@each_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_far_ratios_and_masked_nan(loss, dtype):
    far = jnp.array([[1e4, -1e4, jnp.nan], [-1e4, 1e4, 1e4], [jnp.nan] * 3], dtype)
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    old = jnp.where(mask == 1, 0, jnp.nan).astype(dtype)
    advantages = jnp.array([1.0, -1.0, jnp.nan])
    value, gradient = jax.jit(jax.value_and_grad(loss))(far, old, advantages, mask)
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient.astype(jnp.float32)))
    assert not np.any(jnp.where(mask == 1, 0, gradient))


@each_loss
def test_only_the_policy_has_a_gradient(loss):
    given = {
        "old_log_probs": OLD,
        "advantages": ADVANTAGES,
        "reference_log_probs": REFERENCE,
        "weights": np.array([[1.0, 2, 1], [0.5, 1, 1]]),
    }
    value = lambda new, given: loss(new, mask=MASK, beta=0.1, **given)
    slope, others = jax.jit(jax.grad(value, (0, 1)))(NEW, given)
    assert np.any(slope)
    assert not any(np.any(other) for other in others.values())


def test_first_inner_step_clips_nothing():
    metrics = jax.jit(trust_metrics)(NEW, NEW, ADVANTAGES, MASK, clip=1e-4)
    for name in ("trust/distance", "trust/used", "clip", "clip/low", "clip/high"):
        assert metrics[name] == 0
    kept = jax.jit(divergence_mask)(NEW, NEW, ADVANTAGES, MASK, radius=1e-9)
    np.testing.assert_array_equal(kept, MASK)


PATH = Path(__file__).parents[1] / "golden" / "group.json"
CLIPS = {"clip": 0.2, "clip_high": 0.28}
NEAR = {"clip": 0.03, "clip_high": 0.04}
CASES = {
    "trl/grpo": (grpo_loss, {**CLIPS, "beta": 0.04}),
    "trl/grpo_delta": (grpo_loss, {**CLIPS, "dual_clip": 1.5}),
    "trl/dapo": (dapo_loss, {}),
    "trl/dr_grpo": (dr_grpo_loss, CLIPS),
    "trl/gspo": (gspo_loss, NEAR),
    "trl/luspo": (luspo_loss, NEAR),
    "trl/cispo": (cispo_loss, {"clip_high": 0.2}),
    "trl/sapo": (sapo_loss, {}),
    "trl/vespo": (vespo_loss, {}),
    "verl/vanilla": (dapo_loss, {"dual_clip": 1.5}),
    "verl/grpo": (grpo_loss, CLIPS),
    "verl/gspo": (gspo_loss, {**CLIPS, "level": "token"}),
    "verl/cispo": (cispo_loss, CLIPS),
    "verl/sapo": (sapo_loss, {}),
    "verl/gmpo": (gmpo_loss, CLIPS),
    "verl/dppo_tv": ("tv", {"radius": 0.05, "radius_high": 0.08}),
    "verl/dppo_kl": ("kl", {"radius": 0.01, "radius_high": 0.02}),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name, x64):
    golden = json.loads(PATH.read_text(encoding="utf-8"))
    given = {key: np.array(values) for key, values in golden["arguments"].items()}
    new, reference = given.pop("log_probs"), given.pop("reference_log_probs")
    loss, numbers = CASES[name]
    if isinstance(loss, str):
        mask_of = jax.jit(divergence_mask, static_argnames="divergence")
        weights = mask_of(new, **given, divergence=loss, **numbers)
        loss, numbers = cispo_loss, {"clip": 1.0, "clip_high": 19.0, "weights": weights}
        if name == "verl/dppo_tv":
            assert 0 < np.sum(weights) < np.sum(given["mask"])
    if "beta" in numbers:
        numbers = {**numbers, "reference_log_probs": reference}
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x, **given, **numbers)))(new)
    # verl adds 1e-8 to the number of tokens of an answer.
    np.testing.assert_allclose(value, golden["cases"][name]["value"], rtol=1e-7)
    np.testing.assert_allclose(gradient, golden["cases"][name]["gradient"], rtol=1e-7, atol=1e-12)
