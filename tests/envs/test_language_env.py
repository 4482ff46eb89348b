"""Judges of reasoning that err on a share of the answers."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.envs.language import Rewards, corrupted_judge, rewards_of

COUNT = 4000
KEYS = jax.random.split(jax.random.key(0), 3)
TOKENS = jax.random.randint(KEYS[0], (COUNT, 6), 0, 9)
MASK = jnp.arange(6) < jax.random.randint(KEYS[1], (COUNT, 1), 1, 7)


def _truth(facts: Any, tokens: jax.Array, mask: jax.Array) -> Rewards:
    """Right if the first token is even; the thinking is its size."""
    return rewards_of((tokens[:, 0] % 2 == 0) * 1.0, thinking=tokens[:, 0] / 9)


@pytest.mark.parametrize("kind", ["inverted", "hacked"])
def test_a_share_of_the_answers_is_judged_wrongly(kind: Literal["inverted", "hacked"]) -> None:
    share = 0.3
    found = jax.jit(corrupted_judge(_truth, share, kind=kind))((), TOKENS, MASK)
    true = _truth((), TOKENS, MASK)
    np.testing.assert_array_equal(found.reward, true.reward)
    np.testing.assert_array_equal(found.level, true.level)
    may_differ = np.asarray(true.level == 2) if kind == "hacked" else np.ones(COUNT, bool)
    wrong = np.asarray(found.thinking != true.thinking)
    assert not wrong[~may_differ].any()
    # Equal answers are judged equally, so that there are fewer draws than answers.
    different = len(np.unique(np.where(MASK, TOKENS, -1)[may_differ], axis=0))
    assert abs(wrong[may_differ].mean() - share) < 5 * np.sqrt(share * (1 - share) / different)
    said = 1.0 if kind == "hacked" else 1 - true.thinking
    np.testing.assert_allclose(found.thinking, np.where(wrong, said, true.thinking), atol=1e-6)


def test_the_judge_errs_on_the_same_answers_every_time() -> None:
    """In another batch, behind other padding; another seed errs on others."""
    judge = corrupted_judge(_truth, 0.5)
    found = judge((), TOKENS, MASK).thinking
    spoiled = jnp.where(MASK, TOKENS, 8)
    np.testing.assert_array_equal(judge((), spoiled[7:50], MASK[7:50]).thinking, found[7:50])
    other = corrupted_judge(_truth, 0.5, seed=1)((), TOKENS, MASK).thinking
    assert 0.3 < np.mean(np.asarray(other != found)) < 0.7
    untouched = corrupted_judge(_truth, 0.0)((), TOKENS, MASK).thinking
    np.testing.assert_array_equal(untouched, TOKENS[:, 0] / 9)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share must be <= 1, got 1\.1"):
        corrupted_judge(_truth, 1.1)
    with pytest.raises(ValueError, match="kind must be one of 'inverted', 'hacked'"):
        corrupted_judge(_truth, 0.1, kind="bribed")  # type: ignore[arg-type]
