"""The replay beside a plain list of transitions, and how it is drawn from."""

import jax
import numpy as np
import pytest

from trustjax.agents import replay as replays
from trustjax.agents.rollout import Transition


def transitions(first, num_steps, num_envs):
    """Whose reward says which they are: 100 environment + time."""
    time = first + np.arange(num_steps)[:, None]
    name = (100 * np.arange(num_envs)[None] + time).astype(np.float32)
    flags = np.zeros(name.shape, bool)
    observation = np.stack([name, -name], -1)
    return Transition(observation, name[..., None], name, flags, ~flags, observation + 0.5)


add = jax.jit(replays.add)
sample = jax.jit(replays.sample, static_argnums=2)


def filled(num_envs=4, length=6, steps=(4,)):
    example = jax.tree.map(lambda x: x[0, 0], transitions(0, 1, num_envs))
    replay, first = replays.init(example, num_envs, length), 0
    for num_steps in steps:
        replay = add(replay, transitions(first, num_steps, num_envs))
        first += num_steps
    return replay


def draw(replay, num_groups, size, seed=0):
    keys = jax.random.split(jax.random.key(seed), num_groups)
    return sample(replay, keys, size)


@pytest.mark.parametrize(
    ("steps", "kept"), [((4,), range(4)), ((4, 1), range(5)), ((4, 3), range(1, 7))]
)
def test_every_transition_that_is_kept_is_drawn_and_no_other(steps, kept):
    found = draw(filled(steps=steps), 2, 2000)
    for group in range(2):
        envs = (2 * group, 2 * group + 1)
        expected = [100 * env + time for env in envs for time in kept]
        rewards, counts = np.unique(found.reward[group], return_counts=True)
        assert rewards.tolist() == expected
        assert counts.min() > 0.6 * 2000 / len(expected)  # alike


def test_transitions_stay_together():
    found = draw(filled(steps=(4, 3)), 4, 50)
    np.testing.assert_array_equal(found.action[..., 0], found.reward)
    np.testing.assert_array_equal(found.observation[..., 1], -found.reward)
    np.testing.assert_array_equal(found.final_observation, found.observation + 0.5)
    assert not found.terminated.any()


def test_a_group_draws_the_same_beside_others():
    """As it does on a device that holds the others, and on one that does not."""
    replay = filled(steps=(4, 3))
    both = draw(replay, 2, 8)
    keys = jax.random.split(jax.random.key(0), 2)
    half = replay.replace(experience=jax.tree.map(lambda x: x[2:], replay.experience))
    alone = sample(half, keys[1:], 8)
    jax.tree.map(lambda b, a: np.testing.assert_array_equal(b[1], a[0]), both, alone)


def test_strict_promotion_of_the_caller(strict):
    assert draw(filled(), 2, 3).reward.shape == (2, 3)
