"""Language policies that learn from their own answers, on prompts of two tokens.

The reward is the share of an answer's tokens that are the prompt's favourite. Two programs are
compiled, in which lanes of numbers differ; many tests read their results.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trustjax.agents.language import (
    TRPA,
    Config,
    OnlineDPO,
    PolicyGradient,
    TrustGRPO,
    answer_statistics,
    fine_tuning_loss,
    pass_at_k,
)
from trustjax.agents.language.answers import Answers
from trustjax.agents.language.sampling import draw
from trustjax.envs.language import Prompts, Rewards, host_reward, rewards_of
from trustjax.losses import (
    cispo_loss,
    dapo_loss,
    divergence_mask,
    dr_grpo_loss,
    group_relative,
    grpo_loss,
    gspo_loss,
    leave_one_out,
    periodic_anchor,
    rloo_loss,
    soft_overlong_penalty,
    trpa_loss,
    trust_grpo_advantages,
)
from trustjax.models import Decoder

MODEL = Decoder(vocab_size=8, width=16, depth=1, num_heads=2, mlp_width=16)
PROMPTS = Prompts(
    jnp.array([[0, 3], [1, 2], [5, 6], [4, 4]]),
    jnp.array([[0, 1], [1, 1], [1, 1], [1, 1]], bool),
    jnp.array([2, 3, 4, 5]),
)


def reward(facts: jax.Array, tokens: jax.Array, mask: jax.Array) -> Rewards:
    liked = jnp.sum((tokens == facts[:, None]) & mask, -1) / jnp.maximum(jnp.sum(mask, -1), 1)
    level = jnp.where(liked > 0.5, 1, jnp.where(liked > 0.2, 2, 3))
    return rewards_of(liked, level, liked)


def sgd(learning_rate: Any) -> optax.GradientTransformation:
    return optax.sgd(learning_rate)


TRUST = Config(
    model=MODEL,
    prompts=PROMPTS,
    reward=reward,
    objective=TRPA(functools.partial(trpa_loss, beta=1.0, trust_coefficient=0.0)),
    num_updates=6,
    num_prompts=4,
    num_samples=6,
    max_new_tokens=4,
    stop_tokens=(7,),
    num_epochs=4,
    kl_to="old",
    kl_target=0.02,
    max_kl=jnp.inf,
    optimizer=sgd,
    learning_rate=0.1,
    max_grad_norm=None,
)
# Lanes: c = 0 and 5, stopped behind the first step and not at all.
LANES = {
    "kl_coefficient": jnp.array([0.0, 5.0, 0.0, 5.0]),
    "max_kl": jnp.array([1e-9, 1e-9, 1e9, 1e9]),
}


@pytest.fixture(scope="module")
def start() -> Any:
    return jax.jit(TRUST.agent().init)(jax.random.key(1))


@pytest.fixture(scope="module")
def trust(start: Any) -> Any:
    """States and metrics of one iteration in every lane, and of a second one."""

    @jax.jit
    @jax.vmap
    def lane(numbers: dict[str, jax.Array]) -> Any:
        agent = dataclasses.replace(TRUST, **numbers).agent()
        state = start._replace(kl_coefficient=numbers["kl_coefficient"])

        def twice(state: Any, _: None) -> Any:
            state, metrics = agent.update(state)
            return state, (state, metrics)

        return jax.lax.scan(twice, state, length=2)

    _, (states, metrics) = lane(LANES)
    return states, metrics


def moved(tree: Any, lane: int, other: int) -> float:
    return max(
        float(jnp.max(jnp.abs(x[lane, 0] - x[other, 0]))) for x in jax.tree.leaves(tree.params)
    )


def test_with_one_step_the_trust_region_does_nothing(trust: Any) -> None:
    """At the first step the policy is the old one: the term and its gradient are exactly 0."""
    states, metrics = trust
    assert metrics["gradient_steps"][:, 0].tolist() == [1, 1, 4, 4]
    assert moved(states, 0, 1) == 0.0
    np.testing.assert_array_equal(metrics["trust/distance"][0], metrics["trust/distance"][1])
    assert metrics["loss"][0, 0] == metrics["loss"][1, 0]


def test_with_several_steps_the_trust_region_holds_the_policy(trust: Any) -> None:
    states, metrics = trust
    assert moved(states, 2, 3) > 1e-4
    free, held = metrics["trust/distance"][2:, 0]
    assert 0 < held < 0.7 * free, (held, free)
    # The loss with the trust region falls on the old answers, so that without it, it falls by at
    # least the weight times the KL.
    assert np.all(metrics["loss/after"][:, 0] < metrics["loss"][:, 0])
    radius = metrics["trust/radius"]
    np.testing.assert_allclose(metrics["trust/used"], metrics["trust/distance"] / radius, rtol=1e-6)


def test_the_weight_of_the_kl_follows_its_target(trust: Any) -> None:
    states, metrics = trust
    distance, target = metrics["trust/distance"][:, 0], TRUST.kl_target
    before = np.asarray(LANES["kl_coefficient"])
    factor = np.where(distance > 1.5 * target, 2.0, np.where(distance < target / 1.5, 0.5, 1.0))
    assert {*factor} >= {0.5}
    expected = np.clip(before * factor, 1e-6, 1e6)
    np.testing.assert_allclose(states.kl_coefficient[:, 0], expected, rtol=1e-6)


def test_metrics_describe_the_answers(trust: Any) -> None:
    _, metrics = trust
    shares = sum(metrics[f"level/{level}"] for level in (1, 2, 3, 4))
    np.testing.assert_allclose(shares, 1, rtol=1e-6)
    np.testing.assert_allclose(metrics["level/1"], metrics["accuracy"])
    assert np.all(metrics["pass@6"] >= metrics["accuracy"])
    # The sampler has a cache, and the training pass has none: they agree up to rounding.
    assert np.all(metrics["rollout/largest"] < 1e-4)
    assert np.all(metrics["entropy"] <= np.log(8) + 1e-6)
    assert np.all(metrics["length/mean"] <= 4)
    assert all(np.isfinite(x).all() for x in metrics.values())
    assert metrics["kl/reference"][0, 0] == 0 < metrics["kl/reference"][2, 1]


def by_hand(answers: Any) -> Any:
    """TRPA's loss as a function of policy and reference, without padding before or in between.

    Every answer follows its prompt directly; the causal mask cuts off what comes behind it.
    Which token predicts which, which tokens count and which pairs there are is listed in loops.
    """
    texts, place, weight = np.zeros((24, 6), int), [], np.zeros((24, 24))
    levels = np.asarray(answers.levels)
    for row in range(24):
        group, number = divmod(row, 6)
        prompt = np.asarray(answers.prompts.tokens[group])[np.asarray(answers.prompts.mask[group])]
        answer = np.asarray(answers.tokens[group, number])[np.asarray(answers.mask[group, number])]
        text = [*prompt, *answer]
        texts[row, : len(text)] = text
        place += [(row, at - 1, text[at], len(answer)) for at in range(len(prompt), len(text))]
        for other in range(6):
            if levels[group, number] < levels[group, other]:
                weight[row, group * 6 + other] = 2.5 if levels[group, number] == 1 else 1.0
    row, before, token, length = np.array(place).T
    assert weight.any()

    def mean_log_probs(params: Any) -> jax.Array:
        log_probs = jax.nn.log_softmax(MODEL.apply({"params": params}, texts))
        return jnp.zeros(24).at[row].add(log_probs[row, before, token] / length)

    def loss(params: Any, reference: Any) -> jax.Array:
        delta = mean_log_probs(params) - mean_log_probs(reference)
        losses = jax.nn.softplus(-1.0 * weight * (delta[:, None] - delta[None, :]))
        return jnp.sum((weight > 0) * losses) / np.sum(weight > 0)

    return loss


def test_a_step_descends_the_loss_worked_out_answer_by_answer(start: Any, trust: Any) -> None:
    """Lane 0 makes one step of SGD from the start: the answers are drawn again and worked through.

    It fails if the sign, the order of pairs, the mask or the place of the predicted tokens is off.
    """
    key_draw = jax.random.split(start.key, 3)[1]
    answers = jax.jit(lambda params: draw(TRUST, params, key_draw))(start.params).answers
    worked_out = jax.jit(jax.value_and_grad(by_hand(answers)))
    loss, gradient = worked_out(start.params, start.reference.params)
    states, metrics = trust
    np.testing.assert_allclose(metrics["loss"][0, 0], loss, rtol=1e-5)
    after, _ = worked_out(jax.tree.map(lambda x: x[0, 0], states.params), start.reference.params)
    np.testing.assert_allclose(metrics["loss/after"][0, 0], after, rtol=1e-5)
    assert after < loss
    step = jax.tree.map(lambda new, old: (new[0, 0] - old) / -0.1, states.params, start.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), step, gradient)


GROUPS = dataclasses.replace(
    TRUST,
    objective=PolicyGradient(functools.partial(grpo_loss, beta=0.01), needs_reference=True),
    reward=host_reward(
        lambda fact, text: text.count(str(fact)) / 4, lambda tokens: " ".join(map(str, tokens))
    ),
    reference=periodic_anchor(2),
    num_samples=8,
    num_minibatches=2,
    num_epochs=2,
    sampling_rounds=3,
    kl_to=None,
    kl_target=None,
    max_kl=None,
    optimizer=optax.adam,
    learning_rate=3e-2,
    max_grad_norm=1.0,
)


@pytest.fixture(scope="module")
def groups() -> Any:
    """Two seeds of GRPO with minibatches, a reward of Python's and dynamic sampling."""
    agent = GROUPS.agent()
    keys = jax.random.split(jax.random.key(0), 2)
    advance = jax.jit(jax.vmap(lambda state: agent.advance(state, 10)))
    # On a named device, as what a checkpoint restores is: one program for both.
    start = jax.device_put(jax.jit(jax.vmap(agent.init))(keys), jax.devices()[0])
    middle, first = advance(start)
    end, second = advance(middle)
    return start, middle, end, first, second, advance


@pytest.mark.slow
def test_it_learns_from_rewards_of_python(groups: Any) -> None:
    _, _, _, first, second, _ = groups
    assert np.all(first["reward/mean"][:, 0] < 0.3)
    assert np.all(second["reward/mean"][:, -3:].mean(1) > 0.6)
    assert np.all(first["time/reward"] > 0)
    assert np.all(second["clip"].max(1) > 0)


def test_training_goes_on_exactly_from_a_saved_state(groups: Any, tmp_path: Any) -> None:
    from experiments.runtime.checkpoint import CheckpointMetadata, Checkpoints

    _, middle, end, _, _, advance = groups
    store = Checkpoints(tmp_path / "checkpoints", keep=1)
    store.save(middle, CheckpointMetadata(10, 0, 0.0, False, {}, None))
    again, _ = advance(store.restore(middle))
    jax.tree.map(np.testing.assert_array_equal, data(again), data(end))


def data(state: Any) -> Any:
    return state._replace(key=jax.random.key_data(state.key))


def test_the_reference_is_refreshed(groups: Any) -> None:
    start, middle, _, _, _, _ = groups
    assert middle.reference.refreshes.tolist() == [5, 5]
    jax.tree.map(np.testing.assert_array_equal, middle.reference.params, middle.params)
    assert start.reference.refreshes.tolist() == [0, 0]


def test_prompts_without_a_difference_are_drawn_anew() -> None:
    """Only answers to the first prompt differ in reward."""

    def one(facts: jax.Array, tokens: jax.Array, mask: jax.Array) -> Rewards:
        return rewards_of(jnp.where(facts == 2, tokens[:, 0], 0))

    config = dataclasses.replace(TRUST, reward=one, num_prompts=2, sampling_rounds=12)
    params = config.model.init(jax.random.key(0), PROMPTS.tokens)["params"]
    found = jax.jit(jax.vmap(lambda key: draw(config, params, key)))(
        jax.random.split(jax.random.key(3), 4)
    )
    answers = found.answers
    # Groups are whole: the prompt of each is the one whose answers it holds.
    again = jax.vmap(jax.vmap(lambda fact, tokens: jnp.where(fact == 2, tokens[:, 0], 0)))(
        answers.prompts.facts, answers.tokens
    )
    np.testing.assert_array_equal(answers.rewards, again)
    useful = answers.rewards.max(-1) > answers.rewards.min(-1)
    assert np.all(useful | (found.rounds[:, None] == 12))
    assert useful.mean() > 0.7
    assert np.all(found.informative <= 0.5)
    assert found.rounds.max() > 2
    counted = answers.mask.sum((1, 2, 3))
    assert np.all(found.tokens >= counted)


def test_errors_of_a_reward_name_the_sample() -> None:
    tokens, mask = jnp.array([[1, 2], [3, 4]]), jnp.ones((2, 2), bool)
    words = lambda tokens: " ".join(map(str, tokens))

    def broken(fact: Any, text: str) -> float:
        return 1 / (3 - int(text[0]))

    with pytest.raises(Exception, match=r"reward of sample 1 failed: ZeroDivisionError.*'3 4'"):
        jax.block_until_ready(jax.jit(host_reward(broken, words))((), tokens, mask))
    with pytest.raises(Exception, match=r"reward of sample 0 must be finite, .*reward nan.*'1 2'"):
        jax.block_until_ready(host_reward(lambda fact, text: float("nan"), words)((), tokens, mask))
    pair = host_reward(lambda fact, text: (4, -3), words)((), tokens, mask)
    assert pair.level.tolist() == [4, 4]
    assert pair.reward.tolist() == [-3, -3]


OBJECTIVES = {
    "trpa": TRPA(),
    "grpo": PolicyGradient(),
    "dr_grpo": PolicyGradient(dr_grpo_loss, functools.partial(group_relative, scale="none")),
    "dapo": PolicyGradient(dapo_loss, penalty=lambda lengths: -0.01 * lengths),
    "gspo": PolicyGradient(gspo_loss),
    "rloo": PolicyGradient(rloo_loss, leave_one_out),
    "cispo": PolicyGradient(cispo_loss),
    "dppo": PolicyGradient(
        functools.partial(cispo_loss, clip_high=19.0),
        weights=functools.partial(divergence_mask, radius=0.15),
    ),
    "online_dpo": OnlineDPO(),
    "trust_grpo": TrustGRPO(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns(name: str) -> None:
    config = dataclasses.replace(
        GROUPS, objective=OBJECTIVES[name], reward=reward, num_minibatches=1, sampling_rounds=1,
        num_updates=20, num_epochs=3, learning_rate=2e-2,
    )  # fmt: skip
    _, history = jax.jit(jax.vmap(config.agent().train))(jax.random.split(jax.random.key(0), 3))
    rewards = np.asarray(history["reward/mean"])
    gained = rewards[:, -3:].mean(1) - rewards[:, 0]
    assert gained.mean() > 0.3
    assert np.all(gained > 0.1)


def test_answers_without_randomness_are_the_likeliest() -> None:
    agent = TRUST.agent()
    state = jax.eval_shape(agent.init, jax.random.key(0))
    answers, carry = jax.eval_shape(
        lambda state: agent.act(state, PROMPTS, jax.random.key(0), deterministic=True), state
    )
    assert answers.tokens.shape == (4, 4)
    assert carry == ()


def test_chance_of_one_right_answer_among_k() -> None:
    """Against the share of all draws of k answers without replacement that hold a right one."""
    import itertools

    levels = np.array([[1, 2, 3, 4, 1], [2, 2, 2, 2, 2], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        draws = [
            [1 in row[list(each)] for each in itertools.combinations(range(5), k)] for row in levels
        ]
        np.testing.assert_allclose(pass_at_k(levels, k), np.mean(draws, 1), rtol=1e-5)
    with pytest.raises(ValueError, match="k must be <= 5"):
        pass_at_k(levels, 6)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(256, 1, 1), (5000, 1, 1), (10_000, 2, 10), (99, 40, 60)]
)
def test_chance_among_many_answers(n: int, c: int, k: int) -> None:
    """Differences of log-factorials in float32 would lose all digits, and the sign."""
    levels = np.where(np.arange(n) < c, 1, 2)[None]
    expected = 1 - math.comb(n - c, k) / math.comb(n, k)
    np.testing.assert_allclose(pass_at_k(levels, k), [expected], rtol=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples must be >= 1, got 0"),
        ({"num_samples": 1}, "num_samples must be >= 2, as the objective compares the answers"),
        (
            {"num_samples": 1, "objective": PolicyGradient(), "kl_to": None, "kl_target": None},
            "num_samples must be >= 2, as the objective compares the answers",
        ),
        ({"num_minibatches": 3}, "num_minibatches must divide the 4 prompts, got 3"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0"),
        ({"kl_to": None}, "kl_to must name a policy where there is a kl_target, got None"),
        ({"kl_to": "new"}, "kl_to must be one of 'reference', 'old', got 'new'"),
        ({"old_policy": "new"}, "old_policy must be one of"),
        ({"stop_tokens": (8,)}, r"stop_tokens must be in \[0, 8\), the vocabulary, got 8"),
        ({"model": None}, "model must be a Decoder, got NoneType"),
        ({"reward": None}, "reward must be a function of facts, tokens and mask"),
        (
            {"prompts": PROMPTS._replace(mask=jnp.array([[1, 0]] * 4))},
            "prompts.mask must be True from the first token to the last of a row, got row 0",
        ),
        ({"prompts": PROMPTS._replace(facts=jnp.zeros(3))}, "prompts.facts must have a first"),
        (
            {"prompts": PROMPTS._replace(tokens=PROMPTS.tokens + 3)},
            r"prompts.tokens must be in \[0, 8\), the vocabulary, got 9",
        ),
    ],
)
def test_bad_input_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRUST, **fields).agent()


def test_trust_of_the_reasoning_is_reported() -> None:
    """A group of the worked numbers, where gamma is exp(-0.55), beside one where it is 1."""
    nothing: dict[str, Any] = dict.fromkeys(Answers._fields)
    answers = Answers(**nothing)._replace(
        levels=jnp.array([[1, 2, 3, 1], [1, 2, 2, 1]]),
        thinking=jnp.array([[0.2, 0.8, 0.9, 0.4], [0.9, 0.1, 0.2, 0.8]]),
    )
    found = TrustGRPO().metrics(answers)
    np.testing.assert_allclose(found["thinking/trust"], (np.exp(-0.55) + 1) / 2, rtol=1e-6)
    assert found["thinking/distrusted"] == 0.5
    for options in ({"use_trust": False}, {"form": "code"}, {"threshold": 1.5}):
        untrusted = TrustGRPO(shaped=functools.partial(trust_grpo_advantages, **options))
        assert untrusted.metrics(answers) == {"thinking/trust": 1, "thinking/distrusted": 0}
    assert PolicyGradient().metrics(answers) == TRPA().metrics(answers) == {}


def test_objectives_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="radius must be > 0, got 0"):
        PolicyGradient(radius=0.0)

    def bare(log_probs: Any, old: Any, advantages: Any, mask: Any) -> Any: ...

    with pytest.raises(ValueError, match="loss_fn must take weights, got bare"):
        PolicyGradient(bare, weights=divergence_mask)
    with pytest.raises(ValueError, match="needs_reference must be True"):
        TRPA(needs_reference=False)
    with pytest.raises(ValueError, match="advantage must be left out"):
        TrustGRPO(advantage=leave_one_out)
    with pytest.raises(ValueError, match="penalty must be left out"):
        TrustGRPO(penalty=soft_overlong_penalty)


def test_prompts_padded_on_the_right_are_refused() -> None:
    """The answer's first token would be scored behind the padding."""
    tokens, mask = jnp.array([[1, 5, 0]]), jnp.array([[True, True, False]])
    params = MODEL.init(jax.random.key(0), tokens)["params"]
    for score in (fine_tuning_loss, answer_statistics):
        with pytest.raises(ValueError, match=r"prompt_mask must be True .*, got row 0; pad on"):
            score(MODEL, params, tokens, mask, tokens, mask)
