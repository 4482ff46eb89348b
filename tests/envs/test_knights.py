"""Puzzles of knights and knaves against other implementations and what is known of them."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.envs.knights import (
    OPERATORS,
    Puzzle,
    assignments,
    perturb,
    sample_puzzles,
    sample_statement,
    solve,
    truths,
)

SOLVE = jax.jit(solve)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/knights.json").read_text())


def encoded(statement: Any) -> list[int]:
    """A nested statement of the authors' grammar as five integers."""
    if statement[0] in ("telling-truth", "lying"):
        return [0, statement[1], int(statement[0] == "lying"), 0, 0]
    leaves = [encoded(part)[1:3] for part in statement[1:]]
    return [OPERATORS.index(statement[0]), *itertools.chain(*leaves), *[0] * (4 - 2 * len(leaves))]


# The streams of the authors' sampler with seed 1234, worked out by their code (mem-kk-logic).
T, L = (lambda p: ["telling-truth", p]), (lambda p: ["lying", p])
STREAMS = {
    2: [
        ([["not", T(1)], ["<=>", T(1), L(0)]], [0, 1]),
        ([["->", T(1), L(1)], ["and", T(0), T(1)]], [1, 0]),
        ([["or", T(0), T(1)], L(0)], [1, 0]),
    ],
    3: [
        ([["<=>", T(1), L(1)], ["<=>", L(2), T(2)], ["->", L(0), L(1)]], [0, 0, 1]),
        ([T(2), L(0), ["or", T(0), T(1)]], [1, 0, 1]),
    ],
    5: [
        (
            [["or", T(3), T(2)], ["not", T(2)], ["->", L(0), T(3)], ["->", L(1), L(4)],
             ["not", L(0)]],
            [1, 0, 1, 0, 1],
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize("num_people", STREAMS)
def test_the_stream_is_that_of_the_authors(num_people: int) -> None:
    found = sample_puzzles(num_people, len(STREAMS[num_people]), 1234)
    for index, (statements, solution) in enumerate(STREAMS[num_people]):
        assert found.statements[index].tolist() == [encoded(each) for each in statements]
        assert found.solution[index].tolist() == [bool(role) for role in solution]


def padded(puzzles: list[list[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Puzzles of different numbers of people in one array, and these numbers."""
    statements = np.zeros((len(puzzles), 8, 5), np.int32)
    for row, puzzle in zip(statements, puzzles, strict=True):
        row[: len(puzzle)] = [encoded(each) for each in puzzle]
    return statements, np.array([len(puzzle) for puzzle in puzzles])


def agree(puzzles: list[list[Any]], counts: list[int], first: list[Any]) -> None:
    found = SOLVE(*padded(puzzles))
    assert found.number.tolist() == counts
    for own, other in zip(np.asarray(found.solution), first, strict=True):
        assert other is None or own[: len(other)].tolist() == other


def test_solutions_are_those_of_reasoning_gym() -> None:
    agree(*map(list, zip(*GOLDEN["puzzles"], strict=True)))


def test_solutions_are_those_of_the_installed_reasoning_gym() -> None:
    gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    data = gym.create_dataset("knights_knaves", size=50, seed=7, n_people=4)
    rows = [data[index]["metadata"] for index in range(50)]
    puzzles = [list(row["statements"]) for row in rows]
    agree(puzzles, [1] * 50, [list(map(bool, row["solution"])) for row in rows])


def test_shares_of_puzzles_by_number_of_solutions() -> None:
    """Of the 900 pairs of statements that two people can say, weighed as they are drawn.

    The shares were worked out by the authors' code: .2060 without a solution, .4097 with one.
    """

    def weighted(person: int) -> list[tuple[list[int], float]]:
        leaves = [[p, lie] for p in (0, 1) for lie in (0, 1) if not (lie and p == person)]
        singles = [([op, *x, 0, 0], 1 / 18) for op in (0, 1) for x in leaves]
        pairs = list(itertools.permutations(leaves, 2))
        return singles + [([op, *x, *y], 1 / 36) for op in range(2, 6) for x, y in pairs]

    both = list(itertools.product(weighted(0), weighted(1)))
    assert len(both) == 900
    count = np.asarray(SOLVE(jnp.array([[x[0], y[0]] for x, y in both])).number)
    weight = np.array([x[1] * y[1] for x, y in both])
    shares = [weight[count == 0].sum(), weight[count == 1].sum(), weight[count > 1].sum()]
    np.testing.assert_allclose(shares, [0.2060, 0.4097, 0.3843], atol=5e-5)


def test_every_operator_by_its_truth_table() -> None:
    """Rows: x and y both true, x alone, y alone, none; as logic books have them."""
    tables = {
        "leaf": "1100",
        "not": "0011",
        "and": "1000",
        "or": "1110",
        "->": "1011",
        "<=>": "1001",
    }
    says = jax.jit(lambda statement: truths(statement, assignments(2))[:, 0])
    for code, name in enumerate(OPERATORS):
        statement = jnp.array([[code, 0, 0, 1, 0]] * 2)
        found = says(statement)
        assert "".join(str(int(each)) for each in found) == tables[name], name
        # A lie about both exchanges true and false in the arguments.
        turned = says(statement.at[:, 2].set(1).at[:, 4].set(1))
        assert turned.tolist() == found[::-1].tolist()


def test_nobody_says_to_be_a_knave_and_leaves_differ() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([sample_statement(rng, 1, 2) for _ in range(600)])
    for place, used in ((1, np.ones(600, bool)), (3, drawn[:, 0] > 1)):
        assert not np.any(used & (drawn[:, place] == 1) & (drawn[:, place + 1] == 1))
    two = drawn[drawn[:, 0] > 1]
    assert np.any(two[:, 1:3] != two[:, 3:5], -1).all()
    assert set(drawn[:, 0]) == set(range(6))


def test_puzzles_differ_from_each_other_and_from_those_known() -> None:
    test = sample_puzzles(2, 100, 1)
    train = sample_puzzles(2, 200, 2, known=test)
    both = np.concatenate([test.statements, train.statements]).reshape(300, -1)
    assert len(np.unique(both, axis=0)) == 300
    wide = Puzzle(test.statements.astype(np.int64), test.solution)
    again = sample_puzzles(2, 200, 2, known=wide)
    np.testing.assert_array_equal(again.statements, train.statements)
    single = Puzzle(test.statements[0], test.solution[0])
    with pytest.raises(ValueError, match=r"known must be puzzles \[count, 2, 5\], got shape"):
        sample_puzzles(2, 1, 1, known=single)
    with pytest.raises(ValueError, match="count must be the number of puzzles that 2 people allow"):
        sample_puzzles(2, 400, 1)


@pytest.mark.parametrize("kind", ["statement", "leaf"])
def test_perturbations_change_one_thing_and_the_solution(kind: str) -> None:
    rng = np.random.default_rng(3)
    puzzles, perturbed = sample_puzzles(3, 8, 5), 0
    for statements, solution in zip(*puzzles, strict=True):
        other = perturb(statements, rng, kind=kind)
        if other is None:  # no leaf of this puzzle gives another one with a single solution
            assert kind == "leaf"
            continue
        perturbed += 1
        changed = np.any(other.statements != statements, -1)
        assert changed.sum() == 1
        assert np.any(other.solution != solution)
        assert int(SOLVE(other.statements).number) == 1
        if kind == "leaf":
            before, after = statements[changed][0], other.statements[changed][0]
            assert before[0] == after[0]
            sides = [np.any(before[s] != after[s]) for s in (slice(1, 3), slice(3, 5))]
            assert sum(sides) == 1
    assert perturbed >= 6


def test_bad_input_is_named() -> None:
    says = np.zeros((2, 5), int)  # "A is a knight" twice has several solutions
    for call, message in (
        (lambda: sample_puzzles(9, 1), "num_people must be <= 8, got 9"),
        (lambda: sample_puzzles(1, 1), "num_people must be >= 2, got 1"),
        (lambda: sample_puzzles(3, 0), "count must be >= 1, got 0"),
        (lambda: solve(np.zeros((3, 4), int)), r"statements must be an array \[..., people, 5\]"),
        (lambda: perturb(says, np.random.default_rng(0)), "statements must be a puzzle with one"),
        (lambda: perturb(says, np.random.default_rng(0), kind="name"), "kind must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_padding_neither_adds_nor_takes_solutions() -> None:
    puzzles = sample_puzzles(3, 10, 11)
    wide = np.zeros((10, 8, 5), np.int32)
    wide[:, 3:, 0] = 1  # "person 0 is no knight", which nobody of the padding says
    wide[:, :3] = puzzles.statements
    found = SOLVE(wide, np.full(10, 3))
    assert found.number.tolist() == [1] * 10
    np.testing.assert_array_equal(found.solution[:, :3], puzzles.solution)
    assert np.all(found.solution[:, 3:])
