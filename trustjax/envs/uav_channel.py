r"""The radio channel between unmanned aerial vehicles and users on the ground, and its rates.

Air-to-ground path loss of Al-Hourani, Kandeepan and Lardner, "Optimal LAP altitude for maximum
coverage", IEEE Wireless Communications Letters 3(6), 2014: an elevation angle in degrees gives the
probability of a line of sight, and the loss is the mean, in decibels, over both cases. The mean of
the loss in decibels is neither that of the loss in watts nor that of the gain.

Shapes: N vehicles, K users; `jax.vmap` adds further axes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

SPEED_OF_LIGHT = 299_792_458.0  # m/s


class Scene(NamedTuple):
    """The constants of a kind of terrain.

    Attributes:
      a: First constant of the curve of the line of sight, degrees.
      b: Second constant of the curve, 1/degrees.
      loss_in_sight: Loss above that of free space with a line of sight, dB.
      loss_out_of_sight: The same without a line of sight, dB.
    """

    a: float
    b: float
    loss_in_sight: float
    loss_out_of_sight: float


SCENES = {
    "suburban": Scene(4.88, 0.43, 0.1, 21.0),
    "urban": Scene(9.61, 0.16, 1.0, 20.0),
    "dense_urban": Scene(12.08, 0.11, 1.6, 23.0),
    "high_rise": Scene(27.23, 0.08, 2.3, 34.0),
}


def line_of_sight_probability(
    height: jax.Array, ground_distance: jax.Array, scene: Scene
) -> jax.Array:
    r"""The probability that nothing stands between a vehicle and a user.

    .. math:: P = \frac{1}{1 + a \exp(-b (\theta - a))}, \qquad
              \theta = \frac{180}{\pi} \arctan \frac{h}{r}

    Args:
      height: h, m, > 0, float, any shape.
      ground_distance: r, m, >= 0, of a shape that goes with it.
      scene: The terrain.

    Returns:
      Probabilities of the common shape.

    Source: Al-Hourani et al., 2014, equation 5.
    """
    degrees = jnp.rad2deg(jnp.arctan2(height, ground_distance))
    # The formula as a logistic function, which cannot overflow.
    return jax.nn.sigmoid(scene.b * (degrees - scene.a) - math.log(scene.a))


def path_loss(
    height: jax.Array, ground_distance: jax.Array, scene: Scene, carrier: float
) -> jax.Array:
    r"""The mean loss between a vehicle and a user, in dB.

    .. math:: 20 \log_{10} \frac{4 \pi f d}{c} + P \eta_{LoS} + (1 - P) \eta_{NLoS}, \qquad
              d = \sqrt{h^2 + r^2}

    Args:
      height: h, m, > 0, float, any shape.
      ground_distance: r, m, >= 0, of a shape that goes with it.
      scene: The terrain.
      carrier: Carrier frequency f, Hz.

    Returns:
      Losses of the common shape, dB.

    Source: Al-Hourani et al., 2014, equations 3 and 6.
    """
    in_sight = line_of_sight_probability(height, ground_distance, scene)
    constant = 20 * math.log10(4 * math.pi * carrier / SPEED_OF_LIGHT)
    free_space = 10 * jnp.log10(height**2 + ground_distance**2) + constant
    return free_space + in_sight * scene.loss_in_sight + (1 - in_sight) * scene.loss_out_of_sight


def channel_gains(vehicles: jax.Array, users: jax.Array, scene: Scene, carrier: float) -> jax.Array:
    r"""The share of a vehicle's power that reaches a user, :math:`10^{-L / 10}`.

    Args:
      vehicles: Places (x, y, h), m, float [N, 3].
      users: Places (x, y) on the ground, m, float [K, 2].
      scene: The terrain.
      carrier: Carrier frequency, Hz.

    Returns:
      Gains, float [N, K].
    """
    apart = vehicles[:, None, :2] - users[None]
    # The root has a finite gradient where a vehicle is right above a user.
    ground_distance = jnp.sqrt(jnp.sum(apart**2, -1) + 1e-12)
    loss = path_loss(vehicles[:, 2:], ground_distance, scene, carrier)
    return 10.0 ** (-loss / 10)


def associate(power: jax.Array, gains: jax.Array) -> jax.Array:
    """The vehicle that serves each user: the strongest one, and of equals the first.

    Args:
      power: Transmit powers, W, float [N].
      gains: Gains, float [N, K].

    Returns:
      Vehicles, int32 [K].
    """
    return jnp.argmax(power[:, None] * gains, 0).astype(jnp.int32)


def signal_to_interference(
    power: jax.Array,
    gains: jax.Array,
    serving: jax.Array,
    noise: float,
    channel: jax.Array | None = None,
) -> jax.Array:
    r"""The ratio of signal to interference and noise of each user, a plain number.

    .. math:: \frac{p_i g_{ik}}{\sum_{j \ne i} p_j g_{jk} [c_j = c_i] + \sigma^2}

    Noise and interference are those of the whole band of a channel, however the vehicle divides it
    among its users.

    Args:
      power: p, W, float [N].
      gains: g, float [N, K].
      serving: The vehicle i of each user k, int [K].
      noise: Power of the noise in one channel, W, > 0.
      channel: Channel c of each vehicle, int [N]; None if all share one.

    Returns:
      Ratios, float [K].
    """
    received = power[:, None] * gains
    number = jnp.arange(len(power))
    disturbs = number[:, None] != serving[None]
    if channel is not None:
        disturbs &= channel[:, None] == channel[serving][None]
    # Summed without the signal; the sum of all less the signal would lose weak interference.
    interference = jnp.sum(jnp.where(disturbs, received, 0), 0)
    signal = jnp.take_along_axis(received, serving[None], 0)[0]
    return signal / (interference + noise)


def spectral_efficiency(ratio: jax.Array) -> jax.Array:
    r"""Bits per second and hertz, :math:`\log_2(1 + x)`, of ratios of any shape."""
    return jnp.log1p(ratio) / math.log(2)


def bandwidth_shares(serving: jax.Array, logits: jax.Array) -> jax.Array:
    """How each vehicle divides its band among its users: the softmax of their logits.

    Args:
      serving: The vehicle of each user, int [K].
      logits: One number per user, float [K]; equal ones mean equal shares.

    Returns:
      Shares in (0, 1], float [K]; those of one vehicle's users sum to 1.
    """
    together = serving[:, None] == serving[None]
    totals = jax.nn.logsumexp(jnp.broadcast_to(logits, together.shape), axis=1, where=together)
    return jnp.exp(logits - totals)


def jain_index(rates: jax.Array) -> jax.Array:
    r"""Jain's index of fairness along the last axis, from 1/K (one has all) to 1 (all equal).

    .. math:: \frac{(\sum_k R_k)^2}{K \sum_k R_k^2}

    Where all rates are 0 the index is 1, as all are equal.

    Source: Jain, Chiu and Hawe, DEC technical report 301, 1984.
    """
    scale = jnp.max(jnp.abs(rates), -1, keepdims=True)
    # Squares of rates in bit/s could overflow, and all zeros give 0 / 0.
    relative = jnp.where(scale == 0, 1, rates / jnp.where(scale == 0, 1, scale))
    return jnp.sum(relative, -1) ** 2 / (rates.shape[-1] * jnp.sum(relative**2, -1))


def decibels_to_watts(decibels: float) -> float:
    """Converts dBm into W, or dBm/Hz into W/Hz.

    >>> decibels_to_watts(10.0)
    0.01
    """
    return 10 ** (decibels / 10 - 3)
