r"""Noisy contextual bandits: groups of items whose observed rewards or contexts are corrupted.

A context x and the features phi of an item, both standard normal in d dimensions, have the reward

.. math:: r(x, \phi) = \tanh\left(w^\top [x, \phi]\right) + \tfrac{1}{8} x^\top \phi, \qquad
          \|w\| = 1

with weights w that are drawn once per bandit. A learner sees groups of items with corrupted
rewards, and is measured on clean ones. `SCENARIOS` has four families at three severities:

    outliers      Gaussian noise on each reward, and now and then an outlier from N(0, 10^2)
    shift         contexts of training are moved along every coordinate; rewards are right
    adversarial   the rewards of a whole group change their signs, now and then
    cauchy        Cauchy noise on each reward, which has no mean

All of them are points in one space of numbers, `Corruption`, so that `jax.vmap` runs all scenarios
in one program. The same key draws the same groups in every scenario.

These are the twelve scenarios `trustjax-12`. Those of Wang, arXiv:2510.18913, have the same four
families at three severities, but their rewards, sizes and levels are not published.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_choice, check_count

LEVELS = ("light", "medium", "heavy")


class Corruption(NamedTuple):
    """What happens to the groups of a scenario; numbers or arrays, such as one per scenario.

    Attributes:
      noise: Standard deviation of Gaussian noise on every reward, >= 0.
      outliers: Probability in [0, 1] that a reward has an outlier from N(0, 10^2) added.
      shift: Number that is added to every coordinate of the contexts.
      flips: Probability in [0, 1] that the rewards of a group change their signs.
      cauchy: Scale of Cauchy noise on every reward, >= 0.
    """

    noise: jax.typing.ArrayLike = 0.0
    outliers: jax.typing.ArrayLike = 0.0
    shift: jax.typing.ArrayLike = 0.0
    flips: jax.typing.ArrayLike = 0.0
    cauchy: jax.typing.ArrayLike = 0.0


CLEAN = Corruption()

_FAMILIES = {
    "outliers": {"noise": (0.25, 0.5, 1.0), "outliers": (0.05, 0.1, 0.2)},
    "shift": {"shift": (0.5, 1.0, 2.0)},
    "adversarial": {"flips": (0.1, 0.2, 0.3)},
    "cauchy": {"cauchy": (0.1, 0.3, 1.0)},
}
SCENARIOS = {
    f"{family}/{level}": Corruption(**{name: numbers[i] for name, numbers in fields.items()})
    for family, fields in _FAMILIES.items()
    for i, level in enumerate(LEVELS)
}
_OUTLIER_SCALE = 10.0


class Bandit(NamedTuple):
    """The reward of one bandit.

    Attributes:
      weights: w of norm 1, float32 [2 d].
    """

    weights: jax.Array


class Groups(NamedTuple):
    """Groups of items, one context each.

    Attributes:
      contexts: float32 [n, d].
      items: Features of the items, float32 [n, P, d].
      rewards: True rewards, float32 [n, P].
      observed: Corrupted rewards, float32 [n, P].
    """

    contexts: jax.Array
    items: jax.Array
    rewards: jax.Array
    observed: jax.Array


def corruptions(names: Iterable[str]) -> Corruption:
    """The scenarios of these names, stacked: every field is float32 [len(names)].

    Raises:
      ValueError: A name is not in `SCENARIOS`, or there is none.

    >>> corruptions(["shift/light", "cauchy/heavy"]).cauchy
    array([0., 1.], dtype=float32)
    """
    names = list(names)
    if not names:
        raise FieldError("names", "hold a scenario", names)
    for name in names:
        check_choice("names", name, SCENARIOS)
    return Corruption(*np.array([SCENARIOS[name] for name in names], np.float32).T)


def make_bandit(key: jax.Array, num_features: int = 16) -> Bandit:
    """A bandit with weights that point anywhere with equal probability.

    Args:
      key: Random key.
      num_features: Features d of a context and of an item, >= 1.

    Raises:
      ValueError: `num_features` is not an int >= 1.
    """
    check_count("num_features", num_features, at_least=1)
    weights = jax.random.normal(key, (2 * num_features,), jnp.float32)
    return Bandit(weights / jnp.linalg.norm(weights))


def true_rewards(bandit: Bandit, contexts: jax.Array, items: jax.Array) -> jax.Array:
    r"""Rewards without noise.

    .. math:: \tanh\left(w^\top [x, \phi]\right) + \tfrac{1}{8} x^\top \phi

    Args:
      bandit: The bandit with d features.
      contexts: x, float [..., d].
      items: phi, float [..., P, d].

    Returns:
      Rewards [..., P].

    Raises:
      ValueError: The shapes do not fit.
    """
    size = bandit.weights.shape[-1] // 2
    for name, array in {"contexts": contexts, "items": items}.items():
        if array.shape[-1] != size:
            raise FieldError(name, f"have {size} features along the last axis", array.shape)
    if items.shape[:-2] != contexts.shape[:-1]:
        wanted = f"have the shape of contexts with an axis of items, from {contexts.shape}"
        raise FieldError("items", wanted, items.shape)
    of_context = jnp.einsum("...d,d->...", contexts, bandit.weights[:size])
    of_item = jnp.einsum("...pd,d->...p", items, bandit.weights[size:])
    together = jnp.einsum("...d,...pd->...p", contexts, items)
    return jnp.tanh(of_context[..., None] + of_item) + together / 8


def sample_groups(
    key: jax.Array,
    bandit: Bandit,
    corruption: Corruption = CLEAN,
    *,
    num_groups: int,
    num_items: int = 4,
) -> Groups:
    """Draws groups of items and corrupts their contexts and rewards.

    Args:
      key: Random key. Contexts before the shift, items and draws of noise depend on it alone, so
        the same key pairs the groups of all scenarios and severities.
      bandit: The bandit.
      corruption: What happens to the groups, with scalars; for several, use `jax.vmap`.
      num_groups: n, >= 1.
      num_items: Items P of a group, >= 2.

    Returns:
      The groups. Their true rewards are those at the contexts that are returned.

    Raises:
      ValueError: A number is out of range.

    >>> bandit = make_bandit(jax.random.key(0))
    >>> groups = sample_groups(jax.random.key(1), bandit, SCENARIOS["shift/heavy"], num_groups=2)
    >>> groups.items.shape, bool((groups.observed == groups.rewards).all())
    ((2, 4, 16), True)
    """
    check_count("num_groups", num_groups, at_least=1)
    check_count("num_items", num_items, at_least=2)
    size = bandit.weights.shape[-1] // 2
    of_normals, of_uniforms, of_cauchy = jax.random.split(key, 3)
    # Few large draws, as every draw adds to the time of compilation.
    widths = (size, num_items * size, num_items, num_items)
    normals = jax.random.normal(of_normals, (num_groups, sum(widths)), jnp.float32)
    places = np.cumsum(widths)[:-1].tolist()
    contexts, items, noise, sizes = jnp.split(normals, places, -1)
    uniforms = jax.random.uniform(of_uniforms, (num_groups, num_items + 1), jnp.float32)
    tails = jax.random.cauchy(of_cauchy, (num_groups, num_items), jnp.float32)

    contexts = contexts + jnp.asarray(corruption.shift, jnp.float32)
    items = items.reshape(num_groups, num_items, size)
    rewards = true_rewards(bandit, contexts, items)

    signed = jnp.where(uniforms[:, -1:] < corruption.flips, -rewards, rewards)
    outliers = jnp.where(uniforms[:, :-1] < corruption.outliers, _OUTLIER_SCALE * sizes, 0.0)
    observed = signed + corruption.noise * noise + outliers + corruption.cauchy * tails
    return Groups(contexts, items, rewards, observed)


def win_mass(log_probs: jax.Array, rewards: jax.Array) -> jax.Array:
    r"""The probability that a policy gives to the best item of each group.

    .. math:: \pi(\arg\max_i r_i)

    It rewards sharp policies: of two that rank alike, the sharper one has more. Compare methods at
    equal sharpness, or by the share of groups in which the best item is the most probable.

    Args:
      log_probs: Log-probabilities of the items, float [..., P].
      rewards: True rewards, same shape.

    Returns:
      Probabilities [...].

    Raises:
      ValueError: The shapes differ.
    """
    if jnp.shape(log_probs) != jnp.shape(rewards):
        raise FieldError("rewards", f"have the shape {jnp.shape(log_probs)}", jnp.shape(rewards))
    best = jnp.argmax(rewards, -1, keepdims=True)
    return jnp.exp(jnp.take_along_axis(log_probs, best, -1))[..., 0]
