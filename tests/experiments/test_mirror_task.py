"""Mirror descent's problems: regret and support as theory says, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.mirror import Mirror, Solver
from experiments.tasks.mirror_problems import best_constant_portfolio, log_loss, play, theory_bound
from trustjax.geometry import euclidean, hypentropy, simplex
from trustjax.optim import mirror_descent

SMALL = {
    "solvers": {
        "two": Solver(euclidean(), 0.1),
        "hypentropy": Solver(hypentropy(1e-3), 0.1),
    },
    "seed": 0,
    "num_seeds": 3,
    "precision": "float32",
    "days": 80,
    "num_assets": 5,
    "sizes": (4, 64),
    "rounds": 2000,
    "edge": 0.3,
    "num_unknowns": 40,
    "num_equations": 20,
    "num_nonzero": 2,
    "steps": 2000,
}


@pytest.fixture(scope="module")
def rows():
    task = Mirror(**SMALL)
    task.validate()
    found = []
    for stage in task.stages():
        _, new = stage.advance(stage.init({}), None, 0, 1)
        found += [{"stage": stage.name, "step": 1} | row for row in new]
    return found


@pytest.mark.slow
def test_regret_grows_with_the_root_of_log_n_and_of_n(rows):
    """And stays below the bounds. Fails with the gradient's sign flipped, or the rates swapped."""
    games = Mirror(**SMALL).summarize(rows).values["games"]
    regret = {name: [games[str(n)][name]["mean"] for n in (4, 64)] for name in games["4"]}
    for name, pair in regret.items():
        for n, value in zip((4, 64), pair, strict=True):
            assert 0 < value < theory_bound(name, n, SMALL["rounds"])
    np.testing.assert_allclose(regret["entropy"][1] / regret["entropy"][0], np.sqrt(3), rtol=0.25)
    assert regret["euclidean"][1] > 2.5 * regret["euclidean"][0]  # sqrt(16), before it saturates


def test_hypentropy_finds_the_support_and_the_euclidean_map_the_shortest_solution(rows):
    found = Mirror(**SMALL).summarize(rows).values["regression"]
    for name in found:
        assert found[name]["residual"]["mean"] < 3e-2
    assert found["hypentropy"]["support"]["mean"] == 1.0
    assert found["hypentropy"]["error"]["mean"] < 0.2
    assert found["two"]["error"]["mean"] > 0.4
    assert found["two"]["norm_1"]["mean"] > 1.3 > 1.1 > found["hypentropy"]["norm_1"]["mean"]


def test_best_constant_portfolio():
    """Of two assets that double and halve in turn, half and half; of one that wins, that one."""
    turns = jnp.array([[2.0, 0.5], [0.5, 2.0]] * 4)
    np.testing.assert_allclose(best_constant_portfolio(turns), -8 * np.log(1.25), rtol=1e-5)
    wins = jnp.array([[1.2, 1.0, 0.9]] * 5)
    np.testing.assert_allclose(best_constant_portfolio(wins), -5 * np.log(1.2), rtol=1e-3)


def test_the_player_moves_after_it_has_lost():
    """The first loss is that of the uniform portfolio, whatever the rate."""
    relatives = jnp.array([[2.0, 1.0], [2.0, 1.0]])
    losses = play(mirror_descent(10.0, simplex()), log_loss, relatives)
    np.testing.assert_allclose(losses[0], -np.log(1.5), rtol=1e-6)
    assert losses[1] < losses[0]


def test_regret_is_to_the_best_in_hindsight(rows):
    """No constant portfolio beats it, such as the uniform one."""
    days = [row for row in rows if row["stage"] == "portfolio"]
    assert {row["step"] for row in days} == set(range(10, 81, 10))
    assert all(row["regret/uniform"] > -1e-3 for row in days)


def test_table_and_plot(rows, tmp_path):
    task = Mirror(**SMALL)
    assert [row[0] for row in task.summarize(rows).table.rows] == ["two", "hypentropy"]
    task.plot(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mirror_descent.png"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"num_assets": 1}, "num_assets must be >= 2, got 1"),
        ({"sizes": (1,)}, "sizes must be different numbers >= 2"),
        ({"edge": 1.0}, r"edge must be in \(0, 1\), got 1.0"),
        ({"num_nonzero": 50}, "num_nonzero must be <= num_unknowns = 40, got 50"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Mirror(**SMALL | changes).validate()
