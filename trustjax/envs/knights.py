r"""Knights and knaves: puzzles of who tells the truth, and their solver as one table.

Every person is a knight, who always tells the truth, or a knave, who always lies, and says one
statement about the roles of the people. With a_i = 1 for a knight and S_i(a) the truth of what
person i says, an assignment solves the puzzle if

    a_i = S_i(a)    for every person i

A statement is a leaf ("person p is a knight", "person p is a knave") or an operator over leaves. It
is five integers (operator, p1, lie1, p2, lie2), so that puzzles are arrays and the solver tries all
2^n assignments at once:

    operator   0: x   1: not x   2: x and y   3: x or y   4: if x then y   5: x if and only if y
    x          a[p1] if lie1 = 0, not a[p1] if lie1 = 1;  y likewise; unused integers are 0

Xie et al., On Memorization of Large Language Models in Logical Reasoning, arXiv:2410.23123. With
the same seed the puzzles are those of the authors' generator at depth 2 and width 2. Theirs does
not notice when it finds too few puzzles; this one raises an error. `knights_text` has the words.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError, check_choice, check_count

OPERATORS = ("leaf", "not", "and", "or", "->", "<=>")
MOST_PEOPLE = 8
_TRIES = 1000  # for one puzzle, as in the authors' code
_TOGETHER = 256  # puzzles that are solved at a time

Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Statement = tuple[int, int, int, int, int]


class Puzzle(NamedTuple):
    """A puzzle with exactly one solution, or several of them with a leading axis.

    Attributes:
      statements: What each person says, int32 [..., people, 5].
      solution: Whether each person is a knight, bool [..., people].
    """

    statements: Ints
    solution: Bools


class Solutions(NamedTuple):
    """What `solve` finds.

    Attributes:
      number: Number of assignments that solve the puzzle, int32 [...].
      solution: The first of them, with knights before knaves and person 0 as the slowest to change,
        bool [..., people]; all knights where there is none.
    """

    number: jax.Array
    solution: jax.Array


def assignments(num_people: int) -> Bools:
    """All assignments, bool [2^people, people], in the order in which they are tried.

    >>> assignments(2).astype(int).tolist()
    [[1, 1], [1, 0], [0, 1], [0, 0]]
    """
    _check_people(num_people, at_least=1)
    return np.array(list(itertools.product([True, False], repeat=num_people)))


def truths(statements: jax.Array, roles: jax.Array) -> jax.Array:
    r"""Whether each statement is true under an assignment.

    Args:
      statements: int [..., people, 5].
      roles: Whether each person is a knight, bool [..., people]; leading axes broadcast.

    Returns:
      Bool [..., people].
    """
    statements, roles = jnp.asarray(statements), jnp.asarray(roles, bool)
    shape = jnp.broadcast_shapes(statements.shape[:-1], roles.shape)
    operator, p1, lie1, p2, lie2 = jnp.moveaxis(jnp.broadcast_to(statements, (*shape, 5)), -1, 0)
    roles = jnp.broadcast_to(roles, shape)
    x = jnp.take_along_axis(roles, p1, -1) ^ (lie1 != 0)
    y = jnp.take_along_axis(roles, p2, -1) ^ (lie2 != 0)
    return jnp.select(
        [operator == code for code in range(len(OPERATORS))],
        [x, ~x, x & y, x | y, ~x | y, x == y],
    )


def solve(statements: jax.Array, num_people: jax.Array | None = None) -> Solutions:
    r"""The solutions of puzzles, by enumeration of all assignments.

    .. math:: \#\{a : a_i = S_i(a) \text{ for all } i\}

    Args:
      statements: int [..., people, 5], with 1 to 8 people.
      num_people: How many of the people there are, int [...]; the others are padding and
        knights, whatever they say, and no statement may name them. None for all.

    Returns:
      `Solutions`.

    Raises:
      ValueError: The shape is wrong, or there are too many people.

    >>> import jax.numpy as jnp
    >>> says = jnp.array([[0, 1, 1, 0, 0], [2, 0, 0, 1, 0]])  # B is a knave; A and B are knights
    >>> number, solution = solve(says)
    >>> print(number, solution)
    1 [ True False]
    """
    shape = jnp.shape(statements)
    if len(shape) < 2 or shape[-1] != 5:
        raise FieldError("statements", "be an array [..., people, 5]", f"shape {shape}")
    table = jnp.asarray(assignments(shape[-2]))
    there = jnp.ones(shape[-2], bool)
    if num_people is not None:
        there = jnp.arange(shape[-2]) < jnp.asarray(num_people)[..., None]
    there = jnp.expand_dims(there, -2)
    said = truths(jnp.expand_dims(statements, -3), table)
    # Padding has one role only, so that it does not multiply the solutions.
    fits = jnp.all(jnp.where(there, said == table, table), -1)
    return Solutions(jnp.sum(fits, -1, dtype=jnp.int32), table[jnp.argmax(fits, -1)])


_solve = jax.jit(lambda statements: solve(statements))


def sample_statement(rng: np.random.Generator, person: int, num_people: int) -> Statement:
    """One statement of a person, drawn as the authors' generator draws it at depth 2.

    A die chooses among a leaf and the five operators. A leaf is any role of any person, except that
    nobody says of himself to be a knave. The two leaves of an operator differ.
    """
    operator = int(rng.integers(0, 6))
    if operator == 0:
        return 0, *_leaf(rng, person, num_people), 0, 0
    if operator == 1:
        return 1, *_part(rng, person, num_people), 0, 0
    first = second = _part(rng, person, num_people)
    while second == first:
        second = _part(rng, person, num_people)
    return operator, *first, *second


def _part(rng: np.random.Generator, person: int, num_people: int) -> tuple[int, int]:
    """A leaf below an operator, for which the die is cast too, though it decides nothing."""
    rng.integers(0, 6)
    return _leaf(rng, person, num_people)


def _leaf(rng: np.random.Generator, person: int, num_people: int) -> tuple[int, int]:
    while True:
        lie, about = int(rng.integers(0, 2)), int(rng.integers(0, num_people))
        if not (lie and about == person):
            return about, lie


def sample_puzzles(
    num_people: int,
    count: int,
    seed: int | np.random.Generator = 1234,
    *,
    known: Puzzle | None = None,
) -> Puzzle:
    """Different puzzles with exactly one solution each, in the authors' order.

    Args:
      num_people: Number of people, 2 to 8.
      count: Number of puzzles, >= 1.
      seed: Seed of NumPy's generator, or a generator, which goes on.
      known: Puzzles of as many people that must not come again, such as those of a test set.

    Returns:
      Puzzles with a leading axis of `count`.

    Raises:
      ValueError: A number is out of range, `known` are not puzzles of as many people, or there are
        not that many different puzzles.
    """
    _check_people(num_people)
    check_count("count", count, at_least=1)
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()
    if known is not None:
        shape = np.shape(known.statements)
        if len(shape) != 3 or shape[1:] != (num_people, 5):
            raise FieldError("known", f"be puzzles [count, {num_people}, 5]", f"shape {shape}")
        seen = {each.tobytes() for each in np.asarray(known.statements, np.int32)}
    found: list[Ints] = []
    solutions: list[Bools] = []
    tries = 0
    while len(found) < count:
        # Solved many at a time: the draws do not depend on which of them are accepted.
        drawn = np.array(
            [
                [sample_statement(rng, person, num_people) for person in range(num_people)]
                for _ in range(_TOGETHER)
            ],
            np.int32,
        )
        unique, solution = (np.asarray(x) for x in _solve(drawn))
        for statements, only, roles in zip(drawn, unique == 1, solution, strict=True):
            tries += 1
            if only and statements.tobytes() not in seen and len(found) < count:
                seen.add(statements.tobytes())
                found.append(statements)
                solutions.append(roles)
                tries = 0
        if tries >= _TRIES:
            got = f"{count}, of which {len(found)} were found"
            raise FieldError(
                "count", f"be the number of puzzles that {num_people} people allow", got
            )
    return Puzzle(np.stack(found), np.stack(solutions))


def perturb(
    statements: npt.ArrayLike, rng: np.random.Generator, *, kind: str = "statement"
) -> Puzzle | None:
    """A puzzle that differs in one statement or leaf and has another solution, a single one.

    Whoever has learned a puzzle by heart fails on it.

    Args:
      statements: A puzzle with one solution, int [people, 5].
      rng: Generator of the draws.
      kind: "statement" draws all that one person says anew, "leaf" one leaf of it.

    Returns:
      The puzzle, or None if about 1000 draws give none; some puzzles have no such leaf.

    Raises:
      ValueError: The shape is wrong, the puzzle has no single solution, or `kind` is unknown.

    Source: arXiv:2410.23123, Section 2.2.
    """
    check_choice("kind", kind, ("statement", "leaf"))
    given = np.asarray(statements, np.int32)
    if given.ndim != 2:
        raise FieldError("statements", "be an array [people, 5]", f"shape {given.shape}")
    _check_people(len(given))
    change = _new_statement if kind == "statement" else _new_leaf
    for _ in range(-(-_TRIES // _TOGETHER)):
        tried = np.stack([given, *(change(given, rng) for _ in range(_TOGETHER - 1))])
        numbers, solutions = (np.asarray(x) for x in _solve(tried))
        if numbers[0] != 1:
            raise FieldError("statements", "be a puzzle with one solution", numbers[0])
        works = (numbers == 1) & np.any(solutions != solutions[0], -1)
        if works.any():
            first = int(np.argmax(works))
            return Puzzle(tried[first], solutions[first])
    return None


def memorization_test(
    puzzles: Puzzle, count: int, seed: int | np.random.Generator = 1234
) -> dict[str, Puzzle]:
    """Puzzles of a training set, and what they become by `perturb`, with all solutions different.

    The gap of accuracy between the first and the others is what was learned by heart.

    Args:
      puzzles: Puzzles that are trained on, all of as many people.
      count: Number of them to take, the first ones that can be changed, >= 1.
      seed: Seed of the changes, or a generator, which goes on.

    Returns:
      The puzzles as "train", with one statement changed as "statement", and with one leaf changed
      as "leaf", each with a leading axis of `count`. No changed one is in the training set.

    Raises:
      ValueError: Fewer than `count` puzzles can be changed.

    Source: arXiv:2410.23123, Section 2.2, which counts in addition how often one model solves
      both.
    """
    check_count("count", count, at_least=1)
    rng = np.random.default_rng(seed)
    known = {np.asarray(each, np.int32).tobytes() for each in puzzles.statements}
    found: list[tuple[Puzzle, Puzzle, Puzzle]] = []
    for statements, solution in zip(*puzzles, strict=True):
        changed = [_unknown(statements, rng, kind, known) for kind in ("statement", "leaf")]
        if changed[0] is not None and changed[1] is not None:
            found.append((Puzzle(statements, solution), changed[0], changed[1]))
        if len(found) == count:
            names = ("train", "statement", "leaf")
            groups = zip(*found, strict=True)
            return {
                name: Puzzle(*(np.stack(x) for x in zip(*group, strict=True)))
                for name, group in zip(names, groups, strict=True)
            }
    got = f"{count}, of which {len(found)} were found"
    raise FieldError("count", "be the number of puzzles that can be changed", got)


def _unknown(
    statements: Ints, rng: np.random.Generator, kind: str, known: set[bytes]
) -> Puzzle | None:
    # A changed puzzle may be one that was trained on, above all with two people: another draw then.
    for _ in range(10):
        changed = perturb(statements, rng, kind=kind)
        if changed is None or changed.statements.tobytes() not in known:
            return changed
    return None


def _new_statement(statements: Ints, rng: np.random.Generator) -> Ints:
    changed = statements.copy()
    person = int(rng.integers(0, len(statements)))
    changed[person] = sample_statement(rng, person, len(statements))
    return changed


def _new_leaf(statements: Ints, rng: np.random.Generator) -> Ints:
    changed = statements.copy()
    person = int(rng.integers(0, len(statements)))
    side = int(rng.integers(0, 2)) if statements[person, 0] > 1 else 0
    place = slice(1 + 2 * side, 3 + 2 * side)
    other = statements[person, 3 - 2 * side : 5 - 2 * side]
    while True:
        leaf = np.array(_leaf(rng, person, len(statements)), np.int32)
        if statements[person, 0] < 2 or np.any(leaf != other):
            changed[person, place] = leaf
            return changed


def _check_people(num_people: int, at_least: int = 2) -> None:
    check_count("num_people", num_people, at_least=at_least)
    if num_people > MOST_PEOPLE:
        raise FieldError("num_people", f"be <= {MOST_PEOPLE}", num_people)
