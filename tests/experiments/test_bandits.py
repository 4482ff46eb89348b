"""The experiment on noisy bandits: its losses and measures, what it trains, what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.tasks.bandits import Bandits
from experiments.tasks.group_methods import Clipped, Listwise, Method, Pairs, Ranking, Surrogate
from experiments.tasks.group_training import (
    draw_visits,
    fit_reference,
    mean_entropy,
    measures,
    scale_for_entropy,
    train,
)
from trustjax.envs.bandit import Groups
from trustjax.losses import adpo_pairwise_loss, bradley_terry_targets, dpo_loss, reward_targets
from trustjax.models import MLP
from trustjax.optim import natural_gradient

DPO = functools.partial(dpo_loss, beta=0.1)
ADAMW = optax.adamw(5e-3)
RAW = Listwise(functools.partial(reward_targets, temperature=0.1, scale="none"))
TASK = Bandits(
    model=functools.partial(MLP, hidden=(16,)),
    methods={
        "dpo": Method(Pairs(DPO), ADAMW, pairs=True, steps=40, batch_size=16),
        "raw": Method(RAW, ADAMW, steps=40, batch_size=16),
    },
    scenarios=("outliers/light", "adversarial/heavy"),
    reference=optax.adamw(5e-3),
    reference_steps=10,
    reference_groups=16,
    reference_temperature=0.5,
    train_groups=256,
    test_groups=300,
    matched_entropy=0.8,
    seed=0,
    num_seeds=2,
    precision="float32",
)


def table_policy(params, contexts, items):
    """One logit per item, whatever the context."""
    del contexts
    return jnp.broadcast_to(jax.nn.log_softmax(params), items.shape[:-1])


@pytest.fixture(scope="module")
def rows():
    TASK.validate()
    return [
        {"stage": stage.name, "step": 1} | row
        for stage in TASK.stages()
        for row in stage.advance(stage.init({}), None, 0, 1)[1]
    ]


def test_pairs_take_the_better_item_first():
    """-log S(0.1 D) at D = 1.5 and -1; the second pair comes in the other order."""
    log_probs = jnp.array([[-12.0, -14.0], [-19.0, -20.5]])
    anchor = jnp.array([[-13.0, -13.5], [-19.5, -20.0]])
    rewards = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    found = jax.jit(Pairs(DPO))(log_probs, anchor, rewards)
    np.testing.assert_allclose(found, [0.6209570478, 0.7443966601], rtol=1e-6)
    graded = Pairs(
        functools.partial(adpo_pairwise_loss, temperature=10.0),
        functools.partial(bradley_terry_targets, temperature=1e-3),
    )
    np.testing.assert_allclose(jax.jit(graded)(log_probs, anchor, rewards), found, rtol=1e-6)


def test_ranking_of_two_is_dpo():
    log_probs, anchor = jnp.array([[-14.0, -12.0]]), jnp.array([[-13.5, -13.0]])
    found = jax.jit(Ranking(0.1))(log_probs, anchor, jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(found, [0.6209570478], rtol=1e-6)


def test_policy_losses_by_hand():
    """Rewards (1, 0) are advantages +-1 / sqrt 2; ratios (1.6, 0.4) are clipped at 1.2 and 0.8."""
    log_probs, anchor = jnp.log(jnp.array([[0.8, 0.2]])), jnp.log(jnp.array([[0.5, 0.5]]))
    rewards = jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(
        jax.jit(Surrogate())(log_probs, anchor, rewards),
        [-0.5 * (1.6 - 0.4) / np.sqrt(2)],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        jax.jit(Clipped(0.2))(log_probs, anchor, rewards),
        [-0.5 * (1.2 - 0.8) / np.sqrt(2)],
        rtol=1e-5,
    )


def test_scale_for_entropy():
    """Exact for two items: the entropy of sigmoid(log 3) is that of (3/4, 1/4)."""
    logits = jnp.array([[2.0, 0.0], [0.0, 2.0]])
    wanted = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(scale_for_entropy(logits, wanted), np.log(3) / 2, rtol=1e-4)
    sharp = 1e3 * jnp.array([[1.0, 0.0, -1.0]])
    np.testing.assert_allclose(mean_entropy(sharp * scale_for_entropy(sharp, 0.5)), 0.5, rtol=1e-3)


def test_measures_tell_order_from_sharpness():
    """Policies of the same order and another sharpness differ in the mass, unless matched."""
    rewards = jnp.array([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]])
    groups = Groups(None, None, rewards, rewards)
    blunt = jax.nn.log_softmax(jnp.array([[0.3, 0.1, 0.0], [0.1, 0.4, 0.5]]))
    sharp = jax.nn.log_softmax(10 * blunt)
    measured = jax.jit(functools.partial(measures, entropy=0.7))
    first, second = (measured(x, blunt, groups) for x in (blunt, sharp))
    assert second["win_mass"] > first["win_mass"] + 0.1
    np.testing.assert_allclose(second["win_mass/matched"], first["win_mass/matched"], rtol=1e-4)
    np.testing.assert_allclose(first["accuracy"], 0.5)
    assert first["trust/distance"] == 0
    assert second["trust/distance"] > 0.1


@pytest.fixture(scope="module")
def trained():
    """A table of two logits, trained to the target (.8, .2) at tau = 1 from the anchor (.6, .4)."""
    rewards = jnp.broadcast_to(jnp.log(jnp.array([0.8, 0.2])), (64, 2))
    groups = Groups(jnp.zeros((64, 1)), jnp.zeros((64, 2, 1)), rewards, rewards)
    start = jnp.log(jnp.array([0.6, 0.4]))
    target = Listwise(functools.partial(reward_targets, temperature=1.0, scale="none"))
    settings = {
        "fixed": Method(target, optax.adam(0.05), steps=200, batch_size=4),
        "refreshed": Method(target, optax.adam(0.05), steps=200, batch_size=4, refresh_every=100),
        "trpo": Method(
            Surrogate(),
            natural_gradient(1e-3, damping=1e-3),
            refresh_every=1,
            steps=5,
            batch_size=4,
        ),
    }
    anchor = table_policy(start, groups.contexts, groups.items)

    @jax.jit
    def all_of_them(key):
        def visits(method):
            return draw_visits(
                key, steps=method.steps, batch_size=4, num_groups=64, num_items=2, pairs=False
            )

        return {
            name: jax.nn.softmax(train(method, table_policy, start, anchor, groups, visits(method)))
            for name, method in settings.items()
        }

    return all_of_them(jax.random.key(0))


@pytest.mark.slow
def test_a_fixed_anchor_leads_to_the_optimum(trained):
    """pi* = anchor q^tau, normalised. Fails if the anchor is the policy of the step."""
    expected = np.array([0.6 * 0.8, 0.4 * 0.2])
    np.testing.assert_allclose(trained["fixed"], expected / expected.sum(), atol=2e-3)


def test_a_refresh_compounds(trained):
    """Two rounds lead to anchor q^2. Fails if the anchor is never refreshed, or at every step."""
    expected = np.array([0.6 * 0.8**2, 0.4 * 0.2**2])
    np.testing.assert_allclose(trained["refreshed"], expected / expected.sum(), atol=2e-3)


def test_a_trust_region_bounds_every_step(trained):
    """Five steps of KL 1e-3, which are 5 sqrt(2e-3 p (1 - p)) in p; fails with the sign flipped."""
    moved = trained["trpo"][0] - 0.6
    assert 0.7 < moved / (5 * np.sqrt(2e-3 * 0.24)) < 1.02


def test_reference_fits_the_true_rewards():
    """One step per batch. Fails with the sign of the update flipped."""
    rewards = jnp.broadcast_to(jnp.array([1.0, 0.0]), (400, 2))
    groups = Groups(jnp.zeros((400, 1)), jnp.zeros((400, 2, 1)), rewards, -rewards)
    fitted = fit_reference(
        table_policy, jnp.zeros(2), optax.adam(0.05), groups, steps=100, temperature=0.5
    )
    np.testing.assert_allclose(
        jax.nn.softmax(fitted), jax.nn.softmax(jnp.array([2.0, 0])), atol=1e-2
    )


def test_a_method_that_fails_does_so_in_its_own_stage(monkeypatch):
    """Although it is begun before; and after a restart no earlier method is trained again."""
    begun = []

    def rows_of(self, method):
        begun.append(method)
        if broken and method is self.methods["raw"]:
            raise RuntimeError("out of memory")
        return [{"seed": 0, "steps": method.steps}]

    def started():
        task = dataclasses.replace(TASK)
        vars(task).update(_problems=None, _measured=None)  # which take long to compile
        return task.stages()

    monkeypatch.setattr(Bandits, "_rows", rows_of)
    broken = True
    dpo, raw = started()
    assert dpo.advance({}, None, 0, 1)[1] == [{"seed": 0, "steps": 40}]
    with pytest.raises(RuntimeError, match="out of memory"):
        raw.advance({}, None, 0, 1)
    begun.clear()
    broken = False
    _, raw = started()
    assert raw.advance({}, None, 0, 1)[1] == [{"seed": 0, "steps": 40}]
    assert begun == [TASK.methods["raw"]]


@pytest.mark.slow
def test_training_beats_the_reference_and_noise_hurts(rows):
    found = TASK.summarize(rows).values
    for name in ("dpo", "raw"):
        light, heavy = (found[name]["scenarios"][s]["win_mass"]["mean"] for s in TASK.scenarios)
        assert 0.25 < heavy < light < 1
        assert found[name]["all"]["trust/distance"]["mean"] > 0
    assert found["dpo"]["gains"]["win_mass"]["mean"] == 0
    per_seed = np.subtract(*(found[n]["all"]["win_mass"]["seeds"] for n in ("raw", "dpo")))
    np.testing.assert_allclose(found["raw"]["gains"]["win_mass"]["seeds"], per_seed)


@pytest.mark.slow
def test_plot(rows, tmp_path):
    TASK.plot(rows, tmp_path)
    assert (tmp_path / "bandits.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_groups": 0}, "train_groups must be >= 1, got 0"),
        ({"matched_entropy": 1.5}, "matched_entropy must be < 1.38"),
        ({"scenarios": ("shift/none",)}, "scenarios must be one of"),
        ({"scenarios": ("shift/light",) * 2}, "scenarios must be different names"),
        ({"precision": "bfloat16"}, "precision must be one of 'float32'"),
        ({"only": ("ppo",)}, "only must be one of 'dpo', 'raw'"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TASK, **changes).validate()


def test_refused_methods():
    with pytest.raises(ValueError, match="refresh_every must divide steps = 600, got 7"):
        Method(RAW, ADAMW, refresh_every=7)
    with pytest.raises(ValueError, match="pairs must be true for a loss of pairs"):
        Pairs(DPO)(*3 * [jnp.zeros((1, 4))])
    with pytest.raises(ValueError, match="temperature must be > 0"):
        Listwise(reward_targets, temperature=0.0)
