"""Training and measuring of a policy over the items of a group, for one seed and one scenario."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.tasks.group_methods import Method
from trustjax.distributions import Categorical
from trustjax.envs.bandit import Groups, win_mass
from trustjax.geometry import kl_divergence

Params = Any
# Log-probabilities [..., P] of parameters, contexts [..., d] and items [..., P, d].
Policy = Callable[[Params, jax.Array, jax.Array], jax.Array]
LossFn = Callable[[Params], jax.Array]
Problem = Callable[[Params, Params, Any], tuple[LossFn, dict[str, Any]]]
_BISECTIONS = 40


class Visits(NamedTuple):
    """Which groups a step visits, int [B], and which of their items, int [B, P]."""

    groups: jax.Array
    items: jax.Array


def train(
    method: Method,
    policy: Policy,
    start: Params,
    anchor: jax.Array,
    groups: Groups,
    visits: Visits,
) -> Params:
    """The parameters after training from `start` on the observed rewards of the groups.

    Args:
      method: Loss, optimizer and lengths.
      policy: The policy.
      start: Parameters before the first step, which are the first anchor as well.
      anchor: Log-probabilities of all groups at `start`, [n, P].
      groups: The groups to train on.
      visits: Which of them each step visits, as `draw_visits` returns them.
    """

    def problem(params: Params, held: Params, visit: Visits) -> tuple[LossFn, dict[str, Any]]:
        context = groups.contexts[visit.groups]
        rows = visit.groups[:, None]
        items, rewards = (a[rows, visit.items] for a in (groups.items, groups.observed))
        if method.refresh_every is None:
            anchored = anchor[rows, visit.items]
        else:
            anchored = jax.lax.stop_gradient(policy(held, context, items))

        def loss(params: Params) -> jax.Array:
            return jnp.mean(method.loss(policy(params, context, items), anchored, rewards))

        def divergence(new: Params) -> jax.Array:
            before = jax.lax.stop_gradient(policy(params, context, items))
            return jnp.mean(kl_divergence(before, policy(new, context, items)))

        return loss, {"loss_fn": loss, "divergence_fn": divergence}

    length = method.refresh_every or method.steps
    rounds = jax.tree.map(lambda x: x.reshape(-1, length, *x.shape[1:]), visits)
    return in_rounds(method.optimizer, problem, start, rounds)[0]


def in_rounds(
    optimizer: optax.GradientTransformation, problem: Problem, start: Params, rounds: Any
) -> tuple[Params, Params]:
    """The parameters after training, and those at the beginning of the last round.

    Args:
      optimizer: The optimizer.
      problem: `(params, held, batch) -> (loss_fn, extra arguments of the optimizer)` of a step,
        with the parameters before the step and those at the beginning of its round, which anchors
        are made of.
      start: Parameters before the first step.
      rounds: What `problem` gets as batches, arrays [rounds, steps of a round, ...].
    """
    tx = optax.with_extra_args_support(optimizer)

    def step(carry: tuple[Params, Params, Any], batch: Any) -> tuple[Any, None]:
        params, held, state = carry
        loss_fn, extra = problem(params, held, batch)
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, **extra)
        return (optax.apply_updates(params, updates), held, state), None

    def one_round(carry: tuple[Params, Params, Any], batches: Any) -> tuple[Any, None]:
        params, _, state = carry
        return jax.lax.scan(step, (params, params, state), batches)[0], None

    (params, held, _), _ = jax.lax.scan(one_round, (start, start, tx.init(start)), rounds)
    return params, held


# A program of its own, which methods share: it takes as long to compile as the training of one.
@partial(jax.jit, static_argnames=("steps", "batch_size", "num_groups", "num_items", "pairs"))
def draw_visits(
    key: jax.Array, *, steps: int, batch_size: int, num_groups: int, num_items: int, pairs: bool
) -> Visits:
    """The visits of all steps, int [steps, batch_size, ...].

    Groups are drawn with replacement. A visit is to all items of a group, or with `pairs` to two
    different ones, every pair in every order with the same probability.
    """
    of_groups, of_items = jax.random.split(key)
    shape = (steps, batch_size)
    drawn = jax.random.randint(of_groups, shape, 0, num_groups)
    items = jnp.broadcast_to(jnp.arange(num_items), (*shape, num_items))
    if pairs:
        first, distance = jax.random.randint(
            of_items, (2, *shape), jnp.array([0, 1])[:, None, None], num_items
        )
        items = jnp.stack([first, (first + distance) % num_items], -1)
    return Visits(drawn, items)


def fit_reference(
    policy: Policy,
    start: Params,
    tx: optax.GradientTransformation,
    groups: Groups,
    *,
    steps: int,
    temperature: float,
) -> Params:
    """The parameters fitted to softmax(true rewards / temperature), a batch of groups per step."""
    rounds = jax.tree.map(lambda x: x.reshape(1, steps, -1, *x.shape[1:]), groups)

    def problem(_: Params, held: Params, batch: Groups) -> tuple[LossFn, dict[str, Any]]:
        del held
        target = jax.nn.softmax(batch.rewards / temperature)

        def loss(params: Params) -> jax.Array:
            log_probs = policy(params, batch.contexts, batch.items)
            return jnp.mean(optax.losses.softmax_cross_entropy(log_probs, target))

        return loss, {}

    return in_rounds(tx, problem, start, rounds)[0]


def measures(
    log_probs: jax.Array, reference: jax.Array, groups: Groups, *, entropy: jax.typing.ArrayLike
) -> dict[str, jax.Array]:
    """Means over groups of what is reported, for log-probabilities [n, P] and the reference's.

    `win_mass/matched` is the mass on the best item after the logits are multiplied by the number
    that makes the mean entropy `entropy`, in nats, which tells the order from the sharpness.
    """
    matched = jax.nn.log_softmax(log_probs * scale_for_entropy(log_probs, entropy))
    best = jnp.argmax(groups.rewards, -1)
    return {
        "win_mass": jnp.mean(win_mass(log_probs, groups.rewards)),
        "win_mass/matched": jnp.mean(win_mass(matched, groups.rewards)),
        "accuracy": jnp.mean(jnp.argmax(log_probs, -1) == best),
        "entropy": mean_entropy(log_probs),
        "trust/distance": jnp.mean(kl_divergence(log_probs, reference)),
    }


def mean_entropy(logits: jax.Array) -> jax.Array:
    """The mean entropy in nats of the distributions of logits [n, P]."""
    return jnp.mean(Categorical(logits).entropy())


def scale_for_entropy(logits: jax.Array, entropy: jax.typing.ArrayLike) -> jax.Array:
    """The factor of the logits [n, P] at which their distributions have this mean entropy, nats.

    It is found by bisection of its logarithm in [-10, 10], as the entropy falls with the factor.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        is_blunt = mean_entropy(logits * jnp.exp(middle)) > entropy
        return jnp.where(is_blunt, middle, low), jnp.where(is_blunt, high, middle)

    bounds = (jnp.asarray(-10.0, logits.dtype), jnp.asarray(10.0, logits.dtype))
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, bounds)
    return jnp.exp((low + high) / 2)
