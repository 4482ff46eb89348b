r"""The power that a rotary-wing vehicle needs to fly.

Zeng, Xu and Zhang, "Energy minimization for wireless communication with rotary-wing UAV",
arXiv:1804.02238. The constants are those of public code that uses the formula
(dqtuan99/MADDPG_PER), for a vehicle of 20 N.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotor(NamedTuple):
    """The constants of a rotary-wing vehicle.

    Attributes:
      weight: W, N.
      air_density: rho, kg/m^3.
      radius: R of the rotor, m.
      disc_area: A of the rotor, m^2.
      blade_speed: Omega, angular velocity of the blades, rad/s.
      tip_speed: Speed of the tips of the blades, m/s.
      solidity: s, area of the blades over that of the disc.
      profile_drag: delta, drag coefficient of the blades.
      induced_correction: k, what induced power has beyond that of an ideal rotor, as a share.
      induced_speed: v0, mean induced speed of the air in hovering, m/s.
      fuselage_drag: d0, drag ratio of the fuselage.
    """

    weight: float = 20.0
    air_density: float = 1.225
    radius: float = 0.4
    disc_area: float = 0.503
    blade_speed: float = 300.0
    tip_speed: float = 120.0
    solidity: float = 0.05
    profile_drag: float = 0.012
    induced_correction: float = 0.1
    induced_speed: float = 4.03
    fuselage_drag: float = 0.6

    @property
    def blade_power(self) -> float:
        r"""Power of the blades in hovering, :math:`\delta/8\, \rho s A \Omega^3 R^3`, W."""
        swept = self.air_density * self.solidity * self.disc_area
        return self.profile_drag / 8 * swept * (self.blade_speed * self.radius) ** 3

    @property
    def induced_power(self) -> float:
        r"""Induced power in hovering, :math:`(1 + k) W^{3/2} / \sqrt{2 \rho A}`, W."""
        lift = float(self.weight**1.5 / math.sqrt(2 * self.air_density * self.disc_area))
        return (1 + self.induced_correction) * lift

    @property
    def hover_power(self) -> float:
        """Power in hovering, W."""
        return self.blade_power + self.induced_power


ROTARY_WING = Rotor()


def propulsion_power(speed: jax.Array, rotor: Rotor = ROTARY_WING) -> jax.Array:
    r"""The power of level flight at a speed V, in W.

    .. math:: P_0 \left(1 + \frac{3 V^2}{U_{tip}^2}\right)
              + P_i \left(\sqrt{1 + \frac{V^4}{4 v_0^4}} - \frac{V^2}{2 v_0^2}\right)^{1/2}
              + \tfrac{1}{2} d_0 \rho s A V^3

    Args:
      speed: V, m/s, >= 0, float, any shape.
      rotor: The constants.

    Returns:
      Powers of that shape, W.

    Source: Zeng et al., arXiv:1804.02238, equation 12.
    """
    blades = rotor.blade_power * (1 + 3 * (speed / rotor.tip_speed) ** 2)
    x = (speed / rotor.induced_speed) ** 2 / 2
    # sqrt(1 + x^2) - x as 1 / (sqrt(1 + x^2) + x), which does not cancel at high speed.
    induced = rotor.induced_power * jax.lax.rsqrt(jnp.hypot(1.0, x) + x)
    swept = rotor.air_density * rotor.solidity * rotor.disc_area
    return blades + induced + 0.5 * rotor.fuselage_drag * swept * speed**3
