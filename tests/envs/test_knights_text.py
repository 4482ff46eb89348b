"""The rules that score answers, and what could trick them."""

import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustjax.envs.knights import Puzzle, sample_puzzles, truths
from trustjax.envs.knights_text import (
    NAMES,
    TAGS,
    Score,
    answer_of,
    puzzle_text,
    reasoning_text,
    response_of,
    score_answer,
    solution_text,
    statement_text,
    worked_answer,
)

ADA, BEN, CLEO = NAMES[:3]


def said(answer: str) -> str:
    return f"<think>x</think><answer>{answer}</answer>"


def level(response: str, names: list[str], *roles: int) -> int:
    return score_answer(response, names, np.array(roles, bool)).level


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (said("Ada is a knight, Ben is a knave"), Score(1, 3.0)),
        (said("(1) Ada is a knight\n(2) Ben is a knave"), Score(1, 3.0)),
        (said("ada IS a Knight and BEN is\n a\tKNAVE"), Score(1, 3.0)),
        (said("Ben is a knave. Ada is a knight."), Score(1, 3.0)),
        (said("Ada is a knight, Ben is a knight"), Score(2, -0.5)),
        (said("Ada is a knight"), Score(3, -1.0)),
        (said("Ada is a knight, Ben is one too"), Score(3, -1.0)),
        (said("Ada is a knight, Ben is not a knave"), Score(3, -1.0)),
        (said("Ada is a knight, Ben is a knave, not a knight"), Score(3, -1.0)),
        (said("  \n "), Score(4, -1.0)),
        (said(""), Score(4, -1.0)),
        ("", Score(4, -3.0)),
        ("Ada is a knight, Ben is a knave", Score(4, -3.0)),
    ],
)  # fmt: skip
def test_levels_and_rewards_are_those_of_the_rules(response: str, expected: Score) -> None:
    assert score_answer(response, [ADA, BEN], [True, False]) == expected


RIGHT = "Ada is a knight, Ben is a knave"


@pytest.mark.parametrize(
    "response",
    [
        f"<answer>{RIGHT}</answer>",  # no thought
        f"<think></think><answer>{RIGHT}",  # no end
        f"<think></think><answer>{RIGHT}</answer><answer>{RIGHT}</answer>",  # twice
        f"<think><think></think><answer>{RIGHT}</answer>",
        f"<think></think></answer>{RIGHT}<answer>",  # the wrong order
        f"<answer>{RIGHT}</answer><think></think>",
        f"<think><answer>{RIGHT}</answer></think>",
        f"<THINK></THINK><answer>{RIGHT}</answer>",
        f"\uff1cthink\uff1e\uff1c/think\uff1e<answer>{RIGHT}</answer>",  # wide signs
    ],
)
def test_tags_that_are_missing_repeated_or_in_the_wrong_order(response: str) -> None:
    assert score_answer(response, [ADA, BEN], [True, False]) == Score(4, -3.0)


def test_names_that_begin_or_end_like_others() -> None:
    names = ["Ann", "Anna"]
    assert level(said("Ann is a knight, Anna is a knave"), names, 1, 0) == 1
    assert level(said("Anna is a knight, Ann is a knave"), names, 1, 0) == 2
    assert level(said("Anna is a knight, Anna is a knave"), names, 1, 0) == 3
    assert level(said("Joann is a knight, Anna is a knave"), names, 1, 0) == 3
    names = ["Anne-Marie", "Marie"]
    assert level(said("Anne-Marie is a knight, Anne-Marie is a knave"), names, 1, 1) == 3
    assert level(said("Marie is a knight, Anne-Marie is a knave"), names, 0, 1) == 1
    assert level(said("A.B is a knight, AxB is a knave"), ["A.B", "AxB"], 1, 0) == 1
    assert level(said("AxB is a knight, AxB is a knave"), ["A.B", "AxB"], 1, 0) == 3


def test_whoever_claims_both_roles_gains_nothing() -> None:
    both = "Ada is a knight, Ada is a knave, Ben is a knight, Ben is a knave"
    assert level(said(both), [ADA, BEN], 1, 0) == 3
    # As many roles as people, but not everyone's.
    assert level(said("Ada is a knight, Ada is a knave"), [ADA, BEN], 1, 0) == 3
    assert (
        level(said("Ada is a knight, Ada is a knave, Ben is a knight"), [ADA, BEN, CLEO], 1, 1, 1)
        == 3
    )
    assert level(said("Ada is a knight knave, Ben"), [ADA, BEN], 1, 0) == 3


def test_names_and_answers_in_unicode() -> None:
    composed, decomposed = "Zo\u00eb", "Zoe\u0308"
    for one, other in ((composed, decomposed), (decomposed, composed)):
        assert level(said(f"{one} is a knight, Ben is a knave"), [other, BEN], 1, 0) == 1
    assert level(said("李 is a knight, Ωμέγα is a knave"), ["李", "Ωμέγα"], 1, 0) == 1
    assert level(said("\u200bAda is a knight, Ben is a knave\u200b"), [ADA, BEN], 1, 0) == 1
    assert level(said("Ada\u00a0is a knight, Ben is a knave"), [ADA, BEN], 1, 0) == 1
    assert level(said("Ada is a kni\u200bght, Ben is a knave"), [ADA, BEN], 1, 0) == 3
    assert level(said("Ada is a \uff4bnight, Ben is a knave"), [ADA, BEN], 1, 0) == 3
    assert level(said("\x00\ud800 Ada is a knight, Ben is a knave"), [ADA, BEN], 1, 0) == 1


@pytest.mark.parametrize(
    "text",
    ["<answer>", "<think></think><answer>Ada ", "Ada is a ", "Ada is ", " ", "knight ",
     "</think>", "Ada is a knight Ben is a knave ", "\u0308"],
)  # fmt: skip
def test_long_answers_take_no_longer_than_their_length(text: str) -> None:
    start = time.perf_counter()
    long = text * (100_000 // len(text))
    for response in (
        long,
        said(long),
        f"<think>{long}</think><answer>{RIGHT}</answer>",
        said(" " * 100_000),
    ):
        score_answer(response, [ADA, BEN], [True, False])
    assert time.perf_counter() - start < 2.0  # quadratic time would be minutes


def test_the_transcript_before_the_answer_is_not_scored() -> None:
    asked = "Put it in <answer></answer>, with <think></think> before."
    for header in ("\nAssistant:", "<|im_end|><|im_start|>assistant\n"):
        answer = response_of(f"User: {asked}{header}{said(RIGHT)}")
        assert score_answer(answer, [ADA, BEN], [True, False]).level == 1
    # Only the first header counts: the answer itself cannot begin anew.
    hidden = response_of(f"Assistant: <answer>x</answer> Assistant: {said(RIGHT)}")
    assert score_answer(hidden, [ADA, BEN], [True, False]).level == 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([*TAGS, "Ada", "Ben", " is a ", "knight", "knave", " ", "x", "is", "Adab"]),
        max_size=25,
    )
)
def test_only_a_right_answer_is_of_the_first_level(parts: list[str]) -> None:
    """Whatever the parts of a response are, level 1 needs both right claims, and no other role."""
    response = "".join(parts)
    score = score_answer(response, [ADA, BEN], [True, False])
    assert score.level in (1, 2, 3, 4)
    answer = answer_of(response)
    if score.level == 1:
        assert answer is not None
        assert re.search(r"\bAda\s+is\s+a\s+knight\b", answer)
        assert re.search(r"\bBen\s+is\s+a\s+knave\b", answer)
        assert answer.count("knight") == answer.count("knave") == 1
    assert (score.level == 4) == (not answer)


def test_texts_of_puzzles_and_worked_answers() -> None:
    texts = [statement_text([code, 0, 0, 1, 1], [ADA, BEN]) for code in range(6)]
    assert texts == [
        "Ada is a knight", "Ada is not a knight", "Ada is a knight and Ben is a knave",
        "Ada is a knight or Ben is a knave", "if Ada is a knight then Ben is a knave",
        "Ada is a knight if and only if Ben is a knave",
    ]  # fmt: skip
    puzzles = sample_puzzles(3, 20, 1)
    for statements, solution in zip(*puzzles, strict=True):
        puzzle, names = Puzzle(statements, solution), [CLEO, ADA, BEN]
        question = puzzle_text(statements, names)
        assert all(f"{name} says: " in question for name in names)
        assert puzzle_text(statements, names, intro=False) in question
        for reasoning in (True, False):
            answer = worked_answer(puzzle, names, reasoning=reasoning)
            assert score_answer(answer, names, solution) == Score(1, 3.0)
        assert answer_of(answer) == solution_text(solution, names)
        lines = reasoning_text(puzzle, names).splitlines()
        assert [line.endswith("yes") for line in lines] == [False] * (len(lines) - 1) + [True]
        assert lines[-1].count("knight") == solution.sum()
        # The last line repeats what each person says under the solution, which is their role.
        *_, shown = lines[-1].partition(": ")
        said_of = ["true" if each else "false" for each in np.asarray(truths(statements, solution))]
        assert shown.split() == [*said_of, "yes"]


def test_bad_input_is_named() -> None:
    puzzle = sample_puzzles(2, 1, 1)
    with pytest.raises(ValueError, match="names must be 2, one for each person, got 1"):
        puzzle_text(puzzle.statements[0], [ADA])
    with pytest.raises(ValueError, match="solution must have 2 roles, one per name"):
        score_answer("", [ADA, BEN], [True])
