"""The state of off-policy training."""

from typing import Any, NamedTuple

import jax
import optax

from trustjax.agents.algorithm import Metrics, PyTree
from trustjax.agents.replay import Replay
from trustjax.agents.rollout import Runner


class Learner(NamedTuple):
    """The state of training beside the parameters of the policy and the critics.

    Attributes:
      actor: Optimizer state of the policy.
      critics: Optimizer state of both critics together.
      temperature: Optimizer state of the temperature; () if the temperature is fixed.
      log_temperature: log lambda, float []; None if the temperature is fixed.
      target_critics: Moving averages of the parameters of the critics.
      old_actor: Parameters of the old policy pi_k; None in an algorithm without one.
      gradient_steps: Number of gradient steps done so far, int32 [].
    """

    actor: optax.OptState
    critics: optax.OptState
    temperature: optax.OptState
    log_temperature: jax.Array | None
    target_critics: PyTree
    old_actor: PyTree | None
    gradient_steps: jax.Array


class State(NamedTuple):
    """The whole state of training.

    Attributes:
      params: Variables of the networks, {"actor": ..., "critics": (..., ...)}.
      learner: Optimizer states, target critics and temperature; see `Learner`.
      runner: The environments; split over devices.
      replay: The stored transitions; split over devices as the environments are.
      observations: Running statistics of the observations, a dict for each part of a dict; None
        where they are not normalised.
      key: Random key for everything that is drawn from here on.
      iteration: Number of iterations done so far, int32 [].
      episodes: Mean return and length from the last iteration in which an episode ended; 0 before.
    """

    params: dict[str, PyTree]
    learner: Learner
    runner: Runner
    replay: Replay
    observations: Any
    key: jax.Array
    iteration: jax.Array
    episodes: Metrics
