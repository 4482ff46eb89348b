"""Questions whose answers are judged by rules: generated puzzles, and sets in folders.

Each function is the factory of a file of conf/questions, and makes the questions to train on and
others for the final evaluation.
"""

import functools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks.knights_puzzles import TRAIN_SEED, check_people, train_and_test
from trustjax.data import (
    DataError,
    PuzzleDataset,
    QuestionDataset,
    hugging_face_puzzles,
    hugging_face_questions,
)
from trustjax.envs.knights_text import Score, puzzle_text, score_answer
from trustjax.envs.knights_tokens import Knights
from trustjax.envs.numbers import read_number, score_number


class Question(NamedTuple):
    """A question and its judge.

    Attributes:
      prompt: What the model is asked, with the instruction.
      score: Function of the response of the model: its level and its reward.
    """

    prompt: str
    score: Callable[[str], Score]


class Questions(NamedTuple):
    """Questions of one kind.

    Attributes:
      train: Those to train on.
      test: Others, for the final evaluation.
      name: Short name for messages.
    """

    train: tuple[Question, ...]
    test: tuple[Question, ...]
    name: str


def generated_knights(
    *, instruction: str, num_people: Sequence[int], train: int, test: int
) -> Questions:
    """Knights-and-knaves puzzles that are drawn here.

    Args:
      instruction: What the model is told before each puzzle.
      num_people: Numbers of people, 2 to 8.
      train: Puzzles of each size to train on.
      test: Other puzzles of each size.
    """
    check_people("questions.num_people", num_people)
    rng = np.random.default_rng(TRAIN_SEED)
    parts: tuple[list[Question], list[Question]] = ([], [])
    for number in num_people:
        env = Knights(most_people=number)
        for part, puzzles in zip(parts, train_and_test(number, train, test), strict=True):
            for statements, solution in zip(*puzzles, strict=True):
                names = env.draw_names(number, rng)
                text = puzzle_text(statements, names)
                part.append(_puzzle(instruction, text, names, tuple(map(bool, solution))))
    return Questions(tuple(parts[0]), tuple(parts[1]), "knights")


def knights_folder(
    *, instruction: str, path: str, split: str, test_split: str, **columns: Any
) -> Questions:
    """Puzzles in the layout of K-and-K/knights-and-knaves; `columns` go to the reader.

    Args:
      instruction: What the model is told before each puzzle.
      path: Folder or hub id.
      split: Split to train on, such as "train/people3_num1000".
      test_split: Split of the final evaluation.
      **columns: As in `trustjax.data.hugging_face_puzzles`.
    """

    def questions(found: PuzzleDataset) -> tuple[Question, ...]:
        rows = zip(found.prompts, found.names, found.solutions, strict=True)
        return tuple(_puzzle(instruction, *row) for row in rows)

    own, unseen = (
        hugging_face_puzzles(path, split=name, **columns) for name in (split, test_split)
    )
    return Questions(questions(own), questions(unseen), own.name)


def numbers_folder(
    *,
    instruction: str,
    path: str,
    split: str,
    test_split: str,
    tags: bool,
    **columns: Any,
) -> Questions:
    """Questions in the layout of GSM8K, whose answers end with a number.

    Args:
      instruction: What the model is told before each question.
      path: Folder or hub id.
      split: Split to train on.
      test_split: Split of the final evaluation.
      tags: Whether a response must have its reasoning and its answer in tags.
      **columns: As in `trustjax.data.hugging_face_questions`.

    Raises DataError for an answer without a number.
    """

    def questions(found: QuestionDataset) -> tuple[Question, ...]:
        made = []
        for row, (prompt, answer) in enumerate(zip(found.prompts, found.answers, strict=True)):
            solution = read_number(answer)
            if solution is None:
                raise DataError(f"{found.name}, row {row}: no number in the answer {answer!r:.100}")
            judge = functools.partial(_number, solution=solution, tags=tags)
            made.append(Question(_asked(instruction, prompt), judge))
        return tuple(made)

    own, unseen = (
        hugging_face_questions(path, split=name, **columns) for name in (split, test_split)
    )
    return Questions(questions(own), questions(unseen), own.name)


def _puzzle(
    instruction: str, prompt: str, names: Sequence[str], solution: tuple[bool, ...]
) -> Question:
    judge = functools.partial(score_answer, names=tuple(names), solution=solution)
    return Question(_asked(instruction, prompt), judge)


def _number(response: str, *, solution: Fraction, tags: bool) -> Score:
    return score_number(response, solution, tags=tags)


def _asked(instruction: str, prompt: str) -> str:
    return f"{instruction}\n\n{prompt}" if instruction else prompt
