r"""A network of unmanned aerial vehicles that serve users on the ground, with several agents.

The vehicles are base stations. Each flies over a square, and chooses its transmit power, perhaps a
channel and a split of its band; users listen to the strongest one. It is a Markov game with common
and conflicting interests: vehicles disturb each other on the same channel.

The setting is that of Feng, Wu, Huang and Yuen, "Graph Attention-based Reinforcement Learning for
Trajectory Design and Resource Assignment in Multi-UAV Assisted Communication", arXiv:2401.17880, of
which only the abstract was at hand. States, actions, rewards and constants are therefore not the
paper's; docs/methods/ga_matr.md says where each of them comes from.
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from trustjax.envs import uav_channel, uav_energy, uav_mobility
from trustjax.envs.multi_agent import Actions, MultiAgentEnvironment, MultiAgentStep, Observations
from trustjax.envs.third_party import import_extra
from trustjax.envs.uav_actions import BoxActions, Command, DiscreteActions, Limits
from trustjax.envs.uav_settings import UAVSettings

_CLOSE = 1e-6  # spectral efficiency in bit/s/Hz below which the tilt of bandwidth stops


@flax.struct.dataclass
class UAVState:
    """The state of a network of N vehicles and K users.

    Attributes:
      done: Whether the episode has ended, bool [].
      step: Steps since the start of the episode, int32 [].
      vehicles: Places (x, y, h) of the vehicles, m, float [N, 3].
      power: Their transmit powers, W, float [N].
      channel: Their channels, int32 [N].
      users: Places (x, y) of the users, m, float [K, 2].
      waypoints: Where the users are going, m, float [K, 2].
      serving: The vehicle that serves each user, int32 [K].
      rates: Rates of the users, bit/s, float [K].
      average_rates: Their means over the steps of the episode, bit/s, float [K].
    """

    done: jax.Array
    step: jax.Array
    vehicles: jax.Array
    power: jax.Array
    channel: jax.Array
    users: jax.Array
    waypoints: jax.Array
    serving: jax.Array
    rates: jax.Array
    average_rates: jax.Array


@dataclass(frozen=True, kw_only=True, repr=False)
class MultiUAV(UAVSettings, MultiAgentEnvironment):
    r"""Vehicles that fly over a square and serve users on the ground; each vehicle is an agent.

    In each step the vehicles fly straight for `time_step` seconds at the chosen velocities, users
    move, and every user gets a rate, for the places at the end of the step:

    .. math:: R_k = w_k B \log_2(1 + x_k), \qquad
              x_k = \frac{p_i g_{ik}}{\sum_{j \ne i} p_j g_{jk} [c_j = c_i] + N_0 B}

    Here i is the vehicle whose signal is the strongest, w the shares of its users in its band, and
    :math:`[c_j = c_i]` is 1 for vehicles on the same channel. The reward of vehicle i is

    .. math:: r_i = \frac{w_R}{\hat R} \operatorname{mean}_{k \in U_i} R_k
              - \frac{w_\sigma}{\hat R} \operatorname{std}_k R_k
              - w_E \frac{P(V_i)}{P(0)} - w_C\,\text{collision}_i - w_B\,\text{outside}_i

    with its users :math:`U_i` (0 without users), the rate :math:`\hat R` of a lone user right below
    a lone vehicle, and the propulsion power P. The team's reward is the mean of these.

    An observation of a vehicle has its place, its power and its channel (one-hot, if there are
    several), for each other vehicle in the order of their names a flag and (dx, dy) / area, and for
    each user, the nearest first, a flag, (dx, dy) / sensing radius, rate and average rate over
    :math:`\hat R`; zeros stand for who is out of reach. With `bandwidth_split="per_user"` users
    keep the order of the actions. The world state has places, powers and channels of all vehicles,
    and places, rates and average rates of all users, in an order that never changes.

    Two environments with equal fields are equal, so that compiled programs are shared.

    The fields are those of `UAVSettings`, which documents each of them.

    Raises:
      ValueError: A field is out of range, of the wrong kind, or without effect beside the others.

    >>> env = MultiUAV(num_uavs=2, num_users=3)
    >>> observations, state = jax.jit(env.reset)(jax.random.key(0))
    >>> observations["agent_0"].shape, env.action_space("agent_0").n
    ((22,), 27)
    """

    name = "trustjax:MultiUAV"

    @functools.cached_property
    def agents(self) -> list[str]:
        """Names of the agents."""
        return [f"agent_{i}" for i in range(self.num_uavs)]

    @functools.cached_property
    def observation_spaces(self) -> dict[str, Any]:
        """Boxes from -1 to 1."""
        spaces = import_extra("gymnax.environments.spaces", install='"trustjax[rl]"')
        channels = self.num_channels if self.num_channels > 1 else 0
        size = 4 + channels + 3 * (self.num_uavs - 1) + 5 * self.num_users
        return {agent: spaces.Box(-1.0, 1.0, (size,)) for agent in self.agents}

    @functools.cached_property
    def action_spaces(self) -> dict[str, Any]:
        """One discrete number, or a box from -1 to 1."""
        return {agent: self._code.space() for agent in self.agents}

    @functools.cached_property
    def _code(self) -> BoxActions | DiscreteActions:
        """What actions mean."""
        limits = Limits(
            self.num_users,
            self.max_speed,
            self.max_climb if self.heights[0] < self.heights[1] else 0.0,
            self.max_power,
            self.power_control,
            self.num_channels,
            self.bandwidth_split,
        )
        if self.actions == "continuous":
            return BoxActions(limits)
        return DiscreteActions(
            limits,
            num_speeds=self.num_speeds or 2,
            num_headings=self.num_headings or 4,
            num_levels=self.num_levels or 3,
        )

    def reset(self, key: jax.Array) -> tuple[Observations, UAVState]:
        """Starts an episode: vehicles anywhere, at full power, spread over the channels."""
        key_vehicles, key_users, key_waypoints = jax.random.split(key, 3)
        if self.layout is not None:
            key_users = jax.random.key(self.layout)
        low, high = self._bounds()
        vehicles = low + (high - low) * jax.random.uniform(key_vehicles, (self.num_uavs, 3))
        users = self._draw_users(key_users)
        waypoints = self.area * jax.random.uniform(key_waypoints, users.shape)
        number = jnp.arange(self.num_uavs, dtype=jnp.int32)
        command = Command(
            velocity=jnp.zeros_like(vehicles),
            power=jnp.full_like(vehicles[:, 0], self.max_power),
            channel=number % self.num_channels,
            tilt=jnp.zeros_like(vehicles[:, 0]),
            preference=jnp.zeros((self.num_uavs, self.num_users), vehicles.dtype),
        )
        serving, rates = self._serve(vehicles, users, command)
        state = UAVState(
            done=jnp.zeros([], bool),
            step=jnp.zeros([], jnp.int32),
            vehicles=vehicles,
            power=command.power,
            channel=command.channel,
            users=users,
            waypoints=waypoints,
            serving=serving,
            rates=rates,
            average_rates=jnp.zeros_like(rates),
        )
        return self.get_obs(state), state

    def step_env(self, key: jax.Array, state: UAVState, actions: Actions) -> MultiAgentStep:
        """See `MultiAgentEnvironment`; a step draws random numbers only for moving users.

        `infos`, all [n], besides the ends: "rate" of a vehicle's users together, bit/s; "sum_rate"
        and "jain" of the network; "energy" for propulsion in this step, J; "collision" and
        "outside", 0 or 1.
        """
        command = self._code.decode(jnp.stack([actions[agent] for agent in self.agents]))
        # Flight, which the square and the altitudes hold within their bounds.
        wanted = state.vehicles + self.time_step * command.velocity
        vehicles = jnp.clip(wanted, *self._bounds())
        outside = jnp.any(vehicles[:, :2] != wanted[:, :2], 1)
        collision = self._collisions(state.vehicles, vehicles)
        users, waypoints = state.users, state.waypoints
        if self.user_speed > 0:
            users, waypoints = uav_mobility.random_waypoint(
                key, users, waypoints, self.user_speed * self.time_step, self.area
            )
        serving, rates = self._serve(vehicles, users, command)
        step = state.step + 1
        terminated = jnp.any(collision) if self.end_on_collision else jnp.zeros([], bool)
        truncated = (step >= self.max_steps_in_episode) & ~terminated
        state = UAVState(
            done=terminated | truncated,
            step=step,
            vehicles=vehicles,
            power=command.power,
            channel=command.channel,
            users=users,
            waypoints=waypoints,
            serving=serving,
            rates=rates,
            average_rates=state.average_rates
            + (rates - state.average_rates) / step.astype(rates.dtype),
        )
        power = self._propulsion((vehicles - wanted) / self.time_step + command.velocity)
        rewards = self._rewards(state, power, collision, outside)
        everyone = jnp.ones(self.num_uavs, rates.dtype)
        infos = {
            "terminated": jnp.broadcast_to(terminated, self.num_uavs),
            "truncated": jnp.broadcast_to(truncated, self.num_uavs),
            "rate": self._of_vehicles(serving) @ rates,
            "sum_rate": everyone * jnp.sum(rates),
            "jain": everyone * uav_channel.jain_index(rates),
            "energy": power * self.time_step,
            "collision": collision.astype(rates.dtype),
            "outside": outside.astype(rates.dtype),
        }
        dones = dict.fromkeys([*self.agents, "__all__"], state.done)
        return (
            self.get_obs(state),
            state,
            dict(zip(self.agents, rewards, strict=True)),
            dones,
            infos,
        )

    def get_obs(self, state: UAVState) -> Observations:
        """The observations of all vehicles, and the world state."""
        scale = self.peak_rate
        own = self._own_features(state)
        apart = (state.vehicles[None, :, :2] - state.vehicles[:, None, :2]) / self.area
        sees = self.adjacency(state)[..., None].astype(own.dtype)
        # Every row without its own vehicle: the columns i + 1, i + 2, ... are sorted by number.
        number = jnp.arange(self.num_uavs - 1)
        others = number[None] + (number[None] >= jnp.arange(self.num_uavs)[:, None])
        fleet = jnp.concatenate([sees, sees * apart], -1)
        fleet = jnp.take_along_axis(fleet, others[..., None], 1)
        # Users within the sensing radius.
        gap = (state.users[None] - state.vehicles[:, None, :2]) / self.sensing_radius
        near = (jnp.sum(gap**2, -1, keepdims=True) <= 1).astype(own.dtype)
        rates = jnp.stack([state.rates, state.average_rates], -1) / scale
        crowd = near * jnp.concatenate(
            [jnp.ones_like(near), gap, jnp.broadcast_to(rates, gap.shape)], -1
        )
        if self.bandwidth_split != "per_user":
            nearest = jnp.argsort(jnp.sum(gap**2, -1), -1)
            crowd = jnp.take_along_axis(crowd, nearest[..., None], 1)
        flat = [own, *(part.reshape(self.num_uavs, -1) for part in (fleet, crowd))]
        observations: Observations = dict(zip(self.agents, jnp.concatenate(flat, 1), strict=True))
        return observations | {"world_state": self.get_world_state(state)}

    def get_world_state(self, state: UAVState) -> jax.Array:
        """Places, powers and channels of all vehicles; places and rates of all users; float [d]."""
        rates = jnp.stack([state.rates, state.average_rates], -1) / self.peak_rate
        users = jnp.concatenate([state.users / self.area, rates], -1)
        return jnp.concatenate([self._own_features(state).ravel(), users.ravel()])

    def adjacency(self, state: UAVState) -> jax.Array:
        """Whether two vehicles are within the communication radius, bool [N, N]."""
        apart = state.vehicles[:, None] - state.vehicles[None]
        near = jnp.sum(apart**2, -1) <= self.communication_radius**2
        return near | jnp.eye(self.num_uavs, dtype=bool)

    def _own_features(self, state: UAVState) -> jax.Array:
        """Place, power and channel of each vehicle, float [N, 4 or more]."""
        scale = jnp.array([self.area, self.area, self.heights[1]], state.vehicles.dtype)
        features = [state.vehicles / scale, state.power[:, None] / self.max_power]
        if self.num_channels > 1:
            features.append(jax.nn.one_hot(state.channel, self.num_channels, dtype=scale.dtype))
        return jnp.concatenate(features, -1)

    def _bounds(self) -> tuple[jax.Array, jax.Array]:
        """The corners of the space of the vehicles, m, float [3] each."""
        dtype = jnp.result_type(float)
        low, high = self.heights
        return jnp.array([0.0, 0.0, low], dtype), jnp.array([self.area, self.area, high], dtype)

    def _draw_users(self, key: jax.Array) -> jax.Array:
        """Places of users at the start, m, float [K, 2]."""
        shape = (self.num_users, 2)
        if not self.hotspots:
            return self.area * jax.random.uniform(key, shape)
        key_centers, key_choice, key_places = jax.random.split(key, 3)
        centers = jax.random.uniform(key_centers, (self.hotspots, 2), minval=0.15, maxval=0.85)
        chosen = jax.random.randint(key_choice, (self.num_users,), 0, self.hotspots)
        spread = jax.random.normal(key_places, shape) / 12
        return self.area * jnp.clip(centers[chosen] + spread, 0, 1)

    def _serve(
        self, vehicles: jax.Array, users: jax.Array, command: Command
    ) -> tuple[jax.Array, jax.Array]:
        """The vehicle of each user, int32 [K], and the rates, bit/s, float [K]."""
        scene = uav_channel.SCENES[self.scene]
        gains = uav_channel.channel_gains(vehicles, users, scene, self.carrier)
        serving = uav_channel.associate(command.power, gains)
        ratio = uav_channel.signal_to_interference(
            command.power, gains, serving, self.noise, command.channel
        )
        efficiency = uav_channel.spectral_efficiency(ratio)
        preference = jnp.take_along_axis(command.preference, serving[None], 0)[0]
        tilt = command.tilt[serving] * jnp.log(jnp.maximum(efficiency, _CLOSE))
        shares = uav_channel.bandwidth_shares(serving, preference - tilt)
        return serving, shares * self.bandwidth * efficiency

    def _collisions(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """Whether each vehicle came too close to another one, bool [N]."""
        squared = uav_mobility.closest_approach(before, after)
        other = ~jnp.eye(self.num_uavs, dtype=bool)
        return jnp.any((squared < self.safe_distance**2) & other, 1)

    def _propulsion(self, velocity: jax.Array) -> jax.Array:
        """Power of level flight, and of lifting the weight in climbs, W, float [N]."""
        speed = jnp.sqrt(jnp.sum(velocity[:, :2] ** 2, -1))
        climb = jnp.maximum(velocity[:, 2], 0)
        return uav_energy.propulsion_power(speed) + uav_energy.ROTARY_WING.weight * climb

    def _of_vehicles(self, serving: jax.Array) -> jax.Array:
        """Which users each vehicle serves, 0 or 1, float [N, K]."""
        served = jnp.arange(self.num_uavs)[:, None] == serving[None]
        return served.astype(jnp.result_type(float))

    def _rewards(
        self, state: UAVState, power: jax.Array, collision: jax.Array, outside: jax.Array
    ) -> jax.Array:
        """The rewards of the vehicles, float [N]."""
        rates = state.rates / self.peak_rate
        served = self._of_vehicles(state.serving)
        load = jnp.maximum(jnp.sum(served, 1), 1)
        mean = served @ rates / load
        if self.fairness == "all":
            spread = jnp.std(rates)
        else:
            spread = jnp.sqrt(jnp.sum(served * (rates[None] - mean[:, None]) ** 2, 1) / load)
        own = (
            self.rate_weight * mean
            - self.fairness_weight * spread
            - self.energy_weight * power / uav_energy.ROTARY_WING.hover_power
            - self.collision_weight * collision.astype(rates.dtype)
            - self.boundary_weight * outside.astype(rates.dtype)
        )
        return jnp.broadcast_to(jnp.mean(own), own.shape) if self.reward == "team" else own
