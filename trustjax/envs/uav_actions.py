"""What an action of a vehicle means: two codes, a box and one discrete number.

A vehicle always chooses its velocity along the ground. It also chooses, where the environment lets
it, how fast it climbs, its transmit power, its channel, and how it divides its band.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax.envs.third_party import import_extra
from trustjax.envs.uav_mobility import limited

BANDWIDTHS = ("equal", "tilted", "per_user")
# Logits of bandwidth go from -3 to 3: a user may have up to e^6, or 403, times that of another.
_MOST_LOGIT = 3.0


class Limits(NamedTuple):
    """What vehicles may choose.

    Attributes:
      num_users: Number of users K.
      max_speed: Largest speed along the ground, m/s.
      max_climb: Largest speed up or down, m/s; 0 if the altitude is fixed.
      max_power: Largest transmit power, W.
      power_control: Whether the power is chosen; otherwise it is the largest.
      num_channels: Number of channels; the channel is chosen if there are several.
      bandwidth: How a vehicle divides its band, of `BANDWIDTHS`.
    """

    num_users: int
    max_speed: float
    max_climb: float
    max_power: float
    power_control: bool
    num_channels: int
    bandwidth: str


class Command(NamedTuple):
    """What N vehicles have chosen.

    Attributes:
      velocity: Velocity (x, y, up), m/s, float [N, 3].
      power: Transmit power, W, float [N].
      channel: Channel, int32 [N].
      tilt: Bandwidth is divided in proportion to the spectral efficiency to the power of -tilt,
        float [N]: 0 gives equal shares, 1 equal rates.
      preference: Logits of the users' shares on top of that, float [N, K].
    """

    velocity: jax.Array
    power: jax.Array
    channel: jax.Array
    tilt: jax.Array
    preference: jax.Array


class BoxActions:
    """Actions in a box, float [d] from -1 to 1; numbers outside are clipped.

    The parts follow each other in this order, those that are not chosen left out: velocity along x
    and y as a share of the largest speed (2 numbers; longer ones are shortened to it), climb (1),
    power from none to the largest (1), logits of the channels of which the largest counts
    (`num_channels`), tilt (1) or preferences of users, times 3 (K).
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        sizes = {
            "velocity": 2,
            "climb": int(limits.max_climb > 0),
            "power": int(limits.power_control),
            "channel": limits.num_channels if limits.num_channels > 1 else 0,
            "tilt": int(limits.bandwidth == "tilted"),
            "preference": limits.num_users if limits.bandwidth == "per_user" else 0,
        }
        ends = np.cumsum(list(sizes.values()))
        self._parts = {
            name: slice(int(end) - size, int(end))
            for (name, size), end in zip(sizes.items(), ends, strict=True)
            if size
        }
        self.size = int(ends[-1])

    def space(self) -> Any:
        """The box."""
        return _spaces().Box(-1.0, 1.0, (self.size,))

    def decode(self, actions: jax.Array) -> Command:
        """The command of actions [N, d]."""
        limits, n = self._limits, len(actions)
        actions = jnp.clip(actions, -1, 1)
        part = {name: actions[:, where] for name, where in self._parts.items()}
        none = jnp.zeros((n, 1), actions.dtype)
        climb = limits.max_climb * part.get("climb", none)
        along = limited(limits.max_speed * part["velocity"], limits.max_speed)
        return Command(
            velocity=jnp.concatenate([along, climb], 1),
            power=limits.max_power * (part.get("power", none + 1)[:, 0] + 1) / 2,
            channel=jnp.argmax(part.get("channel", none), 1).astype(jnp.int32),
            tilt=part.get("tilt", none)[:, 0],
            preference=_MOST_LOGIT
            * jnp.broadcast_to(part.get("preference", none), (n, limits.num_users)),
        )


class DiscreteActions:
    """One number for each combination of choices, the last choice changing fastest.

    The choices follow each other in this order, those that are not chosen left out: move (hover,
    then every speed with every heading, headings changing faster, counterclockwise from east),
    climb (down, level, up), power (`num_levels`, the last one the largest), channel, tilt
    (`num_levels` from -1 to 1).
    """

    def __init__(
        self, limits: Limits, *, num_speeds: int, num_headings: int, num_levels: int
    ) -> None:
        self._limits = limits
        speeds = limits.max_speed * np.arange(1, num_speeds + 1) / num_speeds
        angles = 2 * math.pi * np.arange(num_headings) / num_headings
        headings = np.stack([np.cos(angles), np.sin(angles)], -1)
        flights = (speeds[:, None, None] * headings).reshape(-1, 2)
        # What each choice offers, one row for each of its options.
        self._options: dict[str, np.ndarray] = {"move": np.concatenate([np.zeros((1, 2)), flights])}
        if limits.max_climb > 0:
            self._options["climb"] = limits.max_climb * np.array([-1.0, 0.0, 1.0])
        if limits.power_control:
            self._options["power"] = limits.max_power * np.arange(1, num_levels + 1) / num_levels
        if limits.num_channels > 1:
            self._options["channel"] = np.arange(limits.num_channels)
        if limits.bandwidth == "tilted":
            self._options["tilt"] = np.linspace(-1, 1, num_levels)
        self.num_actions = math.prod(map(len, self._options.values()))

    def space(self) -> Any:
        """The space of one discrete action."""
        return _spaces().Discrete(self.num_actions)

    def decode(self, actions: jax.Array) -> Command:
        """The command of actions int [N]."""
        limits, n = self._limits, len(actions)
        digits = jnp.unravel_index(actions, tuple(map(len, self._options.values())))
        dtype = jnp.result_type(float)
        chosen = {
            name: jnp.asarray(options, dtype)[digit]
            for (name, options), digit in zip(self._options.items(), digits, strict=True)
        }
        none = jnp.zeros(n, dtype)
        return Command(
            velocity=jnp.concatenate([chosen["move"], chosen.get("climb", none)[:, None]], 1),
            power=chosen.get("power", none + limits.max_power),
            channel=chosen.get("channel", none).astype(jnp.int32),
            tilt=chosen.get("tilt", none),
            preference=jnp.zeros((n, limits.num_users), dtype),
        )


def _spaces() -> Any:
    return import_extra("gymnax.environments.spaces", install='"trustjax[rl]"')
