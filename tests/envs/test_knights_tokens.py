"""The rules on tokens against those on texts, and the reward of the reasoning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.envs.knights import Puzzle, sample_puzzles
from trustjax.envs.knights_text import TAGS, score_answer
from trustjax.envs.knights_tokens import Knights

KNIGHTS = Knights(names=("Ada", "Ben", "Cleo", "Dan"), most_people=3)
REWARD = jax.jit(KNIGHTS.reward)


@pytest.fixture(scope="module")
def puzzles() -> list[Puzzle]:
    return [sample_puzzles(2, 100, 1), sample_puzzles(3, 100, 1)]


def spoiled(rows: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Answers in which some tokens are exchanged, left out or written twice, most near the end."""
    rows = rows.copy()
    for row, length in zip(rows, lengths, strict=True):
        for _ in range(rng.integers(0, 4)):
            place = int(length - 1 - min(rng.geometric(0.08), length - 1))
            kind = rng.integers(0, 4)
            if kind == 0:
                row[place] = rng.integers(1, KNIGHTS.tokenizer.vocab_size)
            elif kind == 1:
                row[place : length - 1] = row[place + 1 : length]
            elif kind == 2:
                row[place] = KNIGHTS.token(str(rng.choice([*TAGS, "knight", "knave", "Ada", "is"])))
            else:
                row[place] = row[max(0, place - int(rng.integers(1, 12)))]
    return rows


def test_levels_are_those_of_the_texts(puzzles: list[Puzzle]) -> None:
    rng = np.random.default_rng(0)
    prompts, answers = KNIGHTS.prompts(puzzles, seed=3)
    lengths = answers.segments.sum(1)
    tokens = spoiled(answers.tokens, lengths, rng)
    found = REWARD(prompts.facts, tokens, answers.segments != 0)
    words = [KNIGHTS.tokenizer.decode([t]) for t in range(KNIGHTS.tokenizer.vocab_size)]
    for row in range(len(tokens)):
        people = int(prompts.facts.num_people[row])
        names = [words[token] for token in np.asarray(prompts.facts.names[row, :people])]
        # Beyond the token that ends a text the decoder reads nothing, so it must be at the end.
        kept = tokens[row, : lengths[row] - 1]
        text = TAGS[0] + KNIGHTS.tokenizer.decode(kept)
        score = score_answer(text, names, prompts.facts.solution[row, :people])
        assert (int(found.level[row]), float(found.reward[row])) == tuple(score), text
    assert {*np.asarray(found.level).tolist()} == {1, 2, 3, 4}


def test_a_share_of_the_answers_guesses(puzzles: list[Puzzle]) -> None:
    """Guesses have no reasoning and are right by chance; the other answers stay as they are."""
    prompts, answers = KNIGHTS.prompts(puzzles, seed=3)
    same, mixed = KNIGHTS.prompts(puzzles, seed=3, guesses=0.5)
    np.testing.assert_array_equal(same.tokens, prompts.tokens)
    found = REWARD(prompts.facts, mixed.tokens, mixed.segments != 0)
    assert {*np.asarray(found.level).tolist()} == {1, 2}
    guessed = mixed.tokens[:, 0] == KNIGHTS.token(TAGS[1])
    assert abs(guessed.mean() - 0.5) < 4 * np.sqrt(0.25 / len(guessed))
    np.testing.assert_array_equal(np.asarray(found.thinking) == 0, guessed)
    kept = mixed.tokens[~guessed]
    np.testing.assert_array_equal(kept, answers.tokens[~guessed][:, : kept.shape[1]])
    people = np.asarray(prompts.facts.num_people)[guessed]
    chance = 0.5**people
    right = np.asarray(found.level)[guessed] == 1
    assert abs(right.mean() - chance.mean()) < 4 * np.sqrt(
        np.mean(chance * (1 - chance)) / len(right)
    )
    with pytest.raises(ValueError, match=r"guesses must be <= 1, got 1\.5"):
        KNIGHTS.prompts(puzzles, guesses=1.5)


def test_worked_answers_are_right_in_all_steps(puzzles: list[Puzzle]) -> None:
    prompts, answers = KNIGHTS.prompts(puzzles)
    found = REWARD(prompts.facts, answers.tokens, answers.segments != 0)
    assert np.all(found.level == 1)
    np.testing.assert_array_equal(found.thinking, 1.0)
    # A step that is turned round is one right step less; those behind it stand for themselves.
    words = {word: KNIGHTS.token(word) for word in ("true", "false", "yes", "no")}
    steps = np.isin(answers.tokens, list(words.values()))
    turned = answers.tokens.copy()
    for row in turned:
        place = np.flatnonzero(np.isin(row, [words["true"], words["false"]]))[0]
        row[place] = words["false"] if row[place] == words["true"] else words["true"]
    found = REWARD(prompts.facts, turned, answers.segments != 0)
    np.testing.assert_allclose(found.thinking, 1 - 1 / steps.sum(1), rtol=1e-6)
    # A line whose assignment is another one is judged by that assignment.
    other = np.where(
        answers.tokens == KNIGHTS.token("knave"), KNIGHTS.token("knight"), answers.tokens
    )
    found = REWARD(prompts.facts, other, answers.segments != 0)
    assert np.mean(found.thinking) < 0.9


def test_without_steps_there_is_no_reward_of_the_reasoning(puzzles: list[Puzzle]) -> None:
    prompts, answers = KNIGHTS.prompts(puzzles)
    nothing = jnp.full_like(jnp.asarray(answers.tokens), KNIGHTS.token("is"))
    found = REWARD(prompts.facts, nothing, answers.segments != 0)
    assert np.all(found.level == 4)
    assert np.all(found.thinking == 0)


def test_prompts_hold_the_puzzles(puzzles: list[Puzzle]) -> None:
    prompts, answers = KNIGHTS.prompts(puzzles, seed=5)
    prompts.check()
    text = KNIGHTS.tokenizer.decode(np.asarray(prompts.tokens[-1])[np.asarray(prompts.mask[-1])])
    assert text.endswith(TAGS[0])
    assert "<unk>" not in text
    assert text.count("says") == 3
    assert not np.any(answers.tokens == 1)
    ordered = Knights(names=("Ada", "Ben", "Cleo"), shuffled=False).prompts(puzzles[1:])[0]
    assert len(np.unique(ordered.facts.names, axis=0)) == 1
    assert len(np.unique(prompts.facts.names[100:], axis=0)) == 24


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="most_people must be <= 8, got 9"):
        Knights(most_people=9)
    with pytest.raises(ValueError, match="names must be at least 3 different ones"):
        Knights(names=("Ada", "Ben"))
    with pytest.raises(ValueError, match="names must be single words of letters, got 'A B'"):
        Knights(names=("A B", "Ben", "Cleo"))
    with pytest.raises(ValueError, match="puzzles must have at most most_people = 3 people, got 4"):
        KNIGHTS.prompts([sample_puzzles(4, 1)])
