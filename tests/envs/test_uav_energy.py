"""The power of flight against the fact sheet's numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize_scalar

from trustjax.envs.uav_energy import ROTARY_WING, propulsion_power

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/uav.json").read_text())["energy"]


def test_powers(strict):
    np.testing.assert_allclose(
        propulsion_power(jnp.array(GOLDEN["speeds"])), GOLDEN["power"], rtol=1e-6
    )
    np.testing.assert_allclose(ROTARY_WING.blade_power, GOLDEN["blade"], atol=6e-6)
    np.testing.assert_allclose(ROTARY_WING.induced_power, GOLDEN["induced"], atol=6e-9)
    np.testing.assert_allclose(ROTARY_WING.hover_power, GOLDEN["power"][0], rtol=1e-12)


def test_best_speeds(x64):
    """The speeds of least power, away from which it grows, and of least energy a metre."""
    power = jax.jit(propulsion_power)
    least = minimize_scalar(power, bounds=(0, 40), method="bounded", options={"xatol": 1e-6})
    np.testing.assert_allclose([least.x, least.fun], GOLDEN["least_power"], atol=6e-5)
    speeds = np.linspace(0, 60, 200)
    slope = jax.vmap(jax.grad(propulsion_power))(speeds)
    np.testing.assert_array_equal(slope[1:] > 0, speeds[1:] > least.x)
    least = minimize_scalar(lambda v: power(v) / v, bounds=(1, 40), method="bounded")
    np.testing.assert_allclose([least.x, least.fun], GOLDEN["least_per_metre"], atol=6e-4)


def test_extremes():
    """At 300 m/s the textbook form of the induced term has lost a third of it in float32."""
    speed = jnp.array([0.0, 100.0, 300.0])
    x = (np.array(speed, float) / 4.03) ** 2 / 2
    exact = ROTARY_WING.induced_power * np.sqrt(np.sqrt(1 + x**2) - x)
    rest = propulsion_power(speed, ROTARY_WING._replace(induced_correction=-1.0))
    whole = propulsion_power(speed, ROTARY_WING._replace(profile_drag=0.0, fuselage_drag=0.0))
    np.testing.assert_allclose(whole, exact, rtol=1e-5)
    assert (rest >= 0).all()
    assert np.isfinite(jax.vmap(jax.grad(propulsion_power))(speed)).all()
    assert np.isnan(propulsion_power(jnp.nan))
