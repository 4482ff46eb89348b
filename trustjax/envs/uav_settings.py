"""The fields of a network of vehicles and users, and their checks."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_choice, check_count, check_number
from trustjax.envs import uav_channel
from trustjax.envs.arguments import coerce_like
from trustjax.envs.uav_actions import BANDWIDTHS


@dataclass(frozen=True, kw_only=True, repr=False)
class UAVSettings:
    """The fields of `MultiUAV`, which documents what they do together.

    Attributes:
      num_uavs: Number of vehicles N, 2 to 8.
      num_users: Number of users K.
      area: Side of the square, m.
      heights: Lowest and highest altitude, m. Between them vehicles climb and descend, if they
        differ.
      time_step: Length of a step, s.
      max_steps_in_episode: Time limit in steps. It truncates.
      max_speed: Largest speed along the ground, m/s.
      max_climb: Largest speed up and down, m/s.
      user_speed: Speed of users on random waypoints, m/s; 0 for users that stand still.
      layout: Seed of the places of users at the start, which are then the same in every episode;
        None for places that are drawn anew.
      hotspots: Number of points around which users gather at the start, at a standard deviation of
        a twelfth of the area; 0 for users who are anywhere with equal probability.
      scene: Terrain, of `uav_channel.SCENES`.
      carrier: Carrier frequency, Hz.
      bandwidth: Width B of one channel, Hz.
      noise_density: Power of the noise, dBm/Hz.
      max_power: Largest transmit power of a vehicle, W.
      num_channels: Number of channels; with several, each vehicle chooses one.
      power_control: Whether vehicles choose their power.
      bandwidth_split: How a vehicle divides its band: "equal"; "tilted" by a chosen number towards
        its weak or its strong users; or "per_user" by logits, for continuous actions only.
      actions: "discrete" or "continuous"; see `DiscreteActions` and `BoxActions`.
      num_speeds: Number of speeds of discrete actions; None for 2.
      num_headings: Number of headings of discrete actions; None for 4.
      num_levels: Number of levels of power and tilt of discrete actions; None for 3.
      sensing_radius: Distance along the ground up to which a vehicle sees users, m.
      communication_radius: Distance up to which vehicles see each other, m.
      safe_distance: Distance below which vehicles collide, at any time of a step, m.
      end_on_collision: Whether a collision ends the episode, which is a termination.
      reward: "team" or "individual".
      fairness: Users whose rates enter the standard deviation: "all", or those that the vehicle
        "served".
      rate_weight: w_R.
      fairness_weight: w_sigma.
      energy_weight: w_E.
      collision_weight: w_C.
      boundary_weight: w_B, for a vehicle that would have left the square and was held back.

    Raises:
      ValueError: A field is out of range, of the wrong kind, or without effect beside the others.
    """

    num_uavs: int = 3
    num_users: int = 12
    area: float = 1000.0
    heights: tuple[float, float] = (100.0, 100.0)
    time_step: float = 10.0
    max_steps_in_episode: int = 100
    max_speed: float = 10.0
    max_climb: float = 2.0
    user_speed: float = 0.0
    layout: int | None = None
    hotspots: int = 0
    scene: str = "dense_urban"
    carrier: float = 2.4e9
    bandwidth: float = 180e3
    noise_density: float = -170.0
    max_power: float = 0.01
    num_channels: int = 1
    power_control: bool = True
    bandwidth_split: str = "equal"
    actions: str = "discrete"
    num_speeds: int | None = None
    num_headings: int | None = None
    num_levels: int | None = None
    sensing_radius: float = 400.0
    communication_radius: float = 500.0
    safe_distance: float = 10.0
    end_on_collision: bool = False
    reward: str = "team"
    fairness: str = "all"
    rate_weight: float = 1.0
    fairness_weight: float = 0.1
    energy_weight: float = 0.0
    collision_weight: float = 1.0
    boundary_weight: float = 1.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # Programs are compiled for the numbers, and shared between equal environments.
            if isinstance(value, jax.Array):
                raise FieldError(field.name, "be a number of Python", type(value).__name__)
            coerce_like(field.name, value, field.default)
        for name in _POSITIVE:
            check_number(name, getattr(self, name), above=0.0)
        for name in _NOT_NEGATIVE:
            check_number(name, getattr(self, name), at_least=0.0)
        for name, least in _COUNTS.items():
            check_count(name, getattr(self, name), at_least=least)
        check_number("num_uavs", self.num_uavs, at_most=8)
        check_number("layout", self.layout, at_most=2**32 - 1)
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        _check_heights(self.heights)
        self._check_actions()

    def _check_actions(self) -> None:
        """Raises FieldError for a choice that the code of actions does not have."""
        if self.actions == "discrete":
            if self.bandwidth_split == "per_user":
                raise FieldError(
                    "bandwidth_split", "be 'equal' or 'tilted' with discrete actions", "'per_user'"
                )
            if self.num_levels and not self.power_control and self.bandwidth_split != "tilted":
                raise FieldError(
                    "num_levels", "be None without power_control or a tilted split", self.num_levels
                )
            return
        for name in ("num_speeds", "num_headings", "num_levels"):
            if getattr(self, name) is not None:
                raise FieldError(name, "be None with continuous actions", getattr(self, name))

    @property
    def noise(self) -> float:
        """Power of the noise in one channel, W."""
        return uav_channel.decibels_to_watts(self.noise_density) * self.bandwidth

    @property
    def peak_rate(self) -> jax.Array:
        """The rate of a lone user right below a lone vehicle, bit/s, float []; none is higher."""
        loss = uav_channel.path_loss(
            jnp.asarray(self.heights[0]),
            jnp.zeros([]),
            uav_channel.SCENES[self.scene],
            self.carrier,
        )
        ratio = self.max_power * 10 ** (-loss / 10) / self.noise
        return self.bandwidth * uav_channel.spectral_efficiency(ratio)


def _check_heights(heights: Any) -> None:
    """Raises FieldError unless `heights` is a tuple (lowest, highest) of numbers above 0."""
    is_pair = isinstance(heights, tuple) and len(heights) == 2
    if not is_pair or not all(isinstance(height, int | float) for height in heights):
        raise FieldError("heights", "be a tuple of two numbers, (lowest, highest)", repr(heights))
    check_number("heights", heights[0], above=0.0)
    check_number("heights", heights[1], at_least=heights[0])


_POSITIVE = (
    "area", "time_step", "max_speed", "max_climb", "carrier", "bandwidth", "max_power",
    "sensing_radius", "communication_radius",
)  # fmt: skip
_NOT_NEGATIVE = (
    "user_speed", "safe_distance", "rate_weight", "fairness_weight", "energy_weight",
    "collision_weight", "boundary_weight",
)  # fmt: skip
_COUNTS = {
    "num_uavs": 2, "num_users": 1, "max_steps_in_episode": 1, "layout": 0, "hotspots": 0,
    "num_channels": 1, "num_speeds": 1, "num_headings": 1, "num_levels": 1,
}  # fmt: skip
_CHOICES = {
    "scene": uav_channel.SCENES,
    "bandwidth_split": BANDWIDTHS,
    "actions": ("discrete", "continuous"),
    "reward": ("team", "individual"),
    "fairness": ("all", "served"),
}
