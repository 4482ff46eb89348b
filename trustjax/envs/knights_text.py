"""The words of knights-and-knaves puzzles: questions, worked answers, and rules that score answers.

An answer reasons between <think> and </think> and says who is what between <answer> and </answer>.
The rules sort it into one of four levels, which TRPA learns from, and a reward, which the methods
with advantages learn from:

    level   condition                                                    reward
    1       well-formed, readable, all roles right                         3
    2       well-formed, readable, a role is wrong                        -0.5
    3       well-formed, but the roles cannot be read                     -1
    4       empty answer between tags that are well-formed                -1
    4       not well-formed                                               -3

Well-formed means that each of the four tags occurs exactly once, in their order. The roles can be
read if the words "knight" and "knave" occur as often as there are people, and "NAME is a knight" or
"NAME is a knave" for every name. All rules are linear in the length of the text.

Su et al., arXiv:2504.04524, after their code, whose rules are those of Logic-RL, arXiv:2502.14768.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError
from trustjax.envs.knights import Bools, Puzzle, assignments, truths

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ROLES = ("knave", "knight")  # by the truth of "is a knight"
NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jade", "Karl", "Lena",
    "Milo", "Nora", "Otto", "Pia", "Quinn", "Rosa", "Sven", "Tara", "Uma", "Vera", "Will", "Xena",
    "Yuri", "Zora",
)  # fmt: skip
# By level, and for level 4 by whether the tags are well-formed.
REWARDS = {1: 3.0, 2: -0.5, 3: -1.0}
EMPTY, MALFORMED = -1.0, -3.0
_ROLE = re.compile("knight|knave", re.IGNORECASE)
_truths = jax.jit(lambda statements, roles: truths(statements, roles))


class Score(NamedTuple):
    """What the rules say of an answer.

    Attributes:
      level: 1 (best) to 4.
      reward: Reward of the level, between -3 and 3.
    """

    level: int
    reward: float


def statement_text(statement: npt.ArrayLike, names: Sequence[str]) -> str:
    """A statement of five integers in words, without a full stop.

    >>> statement_text([5, 0, 0, 1, 1], ["Ada", "Ben"])
    'Ada is a knight if and only if Ben is a knave'
    """
    operator, p1, lie1, p2, lie2 = (int(x) for x in np.asarray(statement))
    x, y = (f"{names[p]} is a {ROLES[1 - lie]}" for p, lie in ((p1, lie1), (p2, lie2)))
    forms = (
        x, x.replace(" is a ", " is not a "), f"{x} and {y}", f"{x} or {y}", f"if {x} then {y}",
        f"{x} if and only if {y}",
    )  # fmt: skip
    return forms[operator]


def puzzle_text(statements: npt.ArrayLike, names: Sequence[str], *, intro: bool = True) -> str:
    """A puzzle as a question.

    Args:
      statements: int [people, 5].
      names: The name of every person.
      intro: Whether the rules of the island and the question are told too, which do not differ
        between puzzles.

    Raises:
      ValueError: There are not as many names as people.

    >>> puzzle_text([[0, 1, 1, 0, 0], [2, 0, 0, 1, 0]], ["Ada", "Ben"], intro=False)
    'Ada says: Ben is a knave. Ben says: Ada is a knight and Ben is a knight.'
    """
    statements = np.asarray(statements)
    if len(names) != len(statements):
        raise FieldError("names", f"be {len(statements)}, one for each person", len(names))
    said = " ".join(
        f"{name} says: {statement_text(statement, names)}."
        for name, statement in zip(names, statements, strict=True)
    )
    if not intro:
        return said
    met = ", ".join(names[:-1]) + f" and {names[-1]}"
    return (
        "Only knights and knaves live on this island. Knights always tell the truth, and knaves "
        f"always lie. You meet {met}. {said} Who is a knight, and who is a knave?"
    )


def solution_text(solution: npt.ArrayLike, names: Sequence[str]) -> str:
    """The roles in words.

    >>> solution_text([True, False], ["Ada", "Ben"])
    'Ada is a knight, Ben is a knave'
    """
    roles = np.asarray(solution, bool)
    return ", ".join(f"{n} is a {ROLES[int(r)]}" for n, r in zip(names, roles, strict=True))


def reasoning_text(puzzle: Puzzle, names: Sequence[str]) -> str:
    """The search for the solution, one assignment after the other, as a text.

    Every line tries an assignment, in the order of `assignments`: first the role of each name, then
    person by person whether the statement would be true. A statement that does not fit the role
    ends the line with "no"; the line with the solution ends with "yes".

    >>> puzzle = Puzzle(np.array([[0, 1, 1, 0, 0], [2, 0, 0, 1, 0]]), np.array([True, False]))
    >>> print(reasoning_text(puzzle, ["Ada", "Ben"]))
    try Ada knight Ben knight: false no
    try Ada knight Ben knave: true false yes
    """
    lines, table = [], assignments(len(puzzle.statements))
    for roles, said in zip(table, np.asarray(_truths(puzzle.statements, table)), strict=True):
        fits = said == roles
        shown = said if fits.all() else said[: int(np.argmin(fits)) + 1]
        words = [("false", "true")[int(truth)] for truth in shown]
        tried = " ".join(f"{n} {ROLES[int(r)]}" for n, r in zip(names, roles, strict=True))
        lines.append(f"try {tried}: {' '.join(words)} {'yes' if fits.all() else 'no'}")
        if fits.all():
            return "\n".join(lines)
    raise FieldError("puzzle", "have a solution", "none")


def worked_answer(puzzle: Puzzle, names: Sequence[str], *, reasoning: bool = True) -> str:
    """A whole right answer, with its reasoning if asked for, as fine-tuning takes it.

    >>> puzzle = Puzzle(np.array([[0, 1, 1, 0, 0], [2, 0, 0, 1, 0]]), np.array([True, False]))
    >>> worked_answer(puzzle, ["Ada", "Ben"], reasoning=False)
    '<think></think><answer>Ada is a knight, Ben is a knave</answer>'
    """
    thought = reasoning_text(puzzle, names) if reasoning else ""
    said = solution_text(puzzle.solution, names)
    return f"<think>{thought}</think><answer>{said}</answer>"


def response_of(transcript: str) -> str:
    """What follows the first header of an assistant, "Assistant:" or that of a chat template.

    >>> response_of("User: Who is who? Assistant: <think>")
    ' <think>'
    """
    for header in ("Assistant:", "<|im_start|>assistant"):
        _, found, rest = transcript.partition(header)
        if found:
            return rest
    return transcript


def answer_of(response: str) -> str | None:
    """What stands between the answer tags, stripped; None if the response is not well-formed.

    >>> answer_of("<think>1 + 1</think><answer> 2 </answer>")
    '2'
    """
    places = [response.find(tag) for tag in TAGS]
    well_formed = min(places) >= 0 and places == sorted(places)
    if not well_formed or any(response.count(tag) != 1 for tag in TAGS):
        return None
    return response[places[2] + len(TAGS[2]) : places[3]].strip()


def read_roles(answer: str, names: Sequence[str]) -> Bools | None:
    """The role that an answer gives to each name, True for a knight; None if it cannot be read.

    Names stand for themselves as whole words: "Ann" is not read out of "Anna", nor "Marie" out of
    "Anne-Marie" if both are there. Names and roles are compared without regard to case.
    """
    answer = unicodedata.normalize("NFC", answer)
    if len(_ROLE.findall(answer)) != len(names):
        return None
    roles, places = [], set()
    for name in names:
        own = re.escape(unicodedata.normalize("NFC", name))
        found = re.search(rf"\b{own}\b\s+is\s+a\s+\b(knight|knave)\b", answer, re.IGNORECASE)
        if found is None:
            return None
        roles.append(found[1].lower() == "knight")
        places.add(found.start(1))
    # Two names that are read from the same words, because one ends like the other.
    return np.array(roles) if len(places) == len(names) else None


def score_answer(response: str, names: Sequence[str], solution: npt.ArrayLike) -> Score:
    """Level and reward of a response, by the rules of this module.

    Args:
      response: The text of the assistant alone, from <think> on; see `response_of`.
      names: The name of every person.
      solution: Whether each person is a knight, bool [people].

    Raises:
      ValueError: `solution` has not one role for every name.

    >>> names, solution = ["Ada", "Ben"], [True, False]
    >>> said = "Ada is a knight, Ben is a knave"
    >>> score_answer(f"<think></think><answer>{said}</answer>", names, solution)
    Score(level=1, reward=3.0)
    >>> score_answer(said, names, solution)
    Score(level=4, reward=-3.0)
    """
    right = np.asarray(solution, bool)
    if right.shape != (len(names),):
        raise FieldError("solution", f"have {len(names)} roles, one per name", right.shape)
    answer = answer_of(response)
    if not answer:
        return Score(4, MALFORMED if answer is None else EMPTY)
    roles = read_roles(answer, names)
    if roles is None:
        return Score(3, REWARDS[3])
    level = 1 if np.array_equal(roles, right) else 2
    return Score(level, REWARDS[level])
