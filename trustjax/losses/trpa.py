r"""TRPA: preferences between answers that a rule sorts into levels, from 1 (best) to 4.

For every prompt, the policy samples a group of answers. Each ordered pair of answers of different
levels in the group is a preference, and DPO's loss is taken over all of them, on log-ratios that
are means per token:

    Delta_i = mean_t (log pi - log pi_ref)
    h_ij = beta w_i (Delta_i - Delta_j)      where level_i < level_j

A second term keeps the policy near the one that sampled the answers. As long as this is the policy
itself, as at the first step after a rollout, both the term and its gradient are 0.

Arrays of tokens are [batch, time]; answers of one prompt share an entry of `group_ids` and may
stand anywhere in the batch. Under `jax.shard_map` they may even be on different devices, because
the log-ratios are gathered: the loss is that of the whole batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_choice, check_number, check_scalar
from trustjax._sharding import AxisName, gathered, summed
from trustjax.losses._pairs import bounded_expm1
from trustjax.losses._shapes import check_shape, masked
from trustjax.losses.reduction import masked_mean, token_mask
from trustjax.trust import trust_metrics


def preference_levels(well_formed: jax.Array, parsed: jax.Array, correct: jax.Array) -> jax.Array:
    """Levels of answers, from what the rules of a task say of them.

    1: correct. 2: an answer could be read, but is wrong. 3: well-formed, but no answer could be
    read. 4: not well-formed, or empty.

    Args:
      well_formed: Whether the text has the demanded form and an answer in it, bool [...].
      parsed: Whether the answer could be read, bool, same shape.
      correct: Whether the answer is correct, bool, same shape. It counts only where `parsed` does,
        and both only where the text is well-formed.

    Returns:
      Levels, int32 [...], from 1 (best) to 4.

    Raises:
      ValueError: The shapes differ.

    Source: Su et al., arXiv:2504.04524, and their code, whose scalar scores for logging are 3,
    -0.5, -1 and -3.

    >>> import jax.numpy as jnp
    >>> print(preference_levels(*jnp.array([[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 0, 1]], bool)))
    [1 2 3 4]
    """
    check_shape("parsed", parsed, well_formed)
    check_shape("correct", correct, well_formed)
    well_formed, parsed, correct = (jnp.asarray(x, bool) for x in (well_formed, parsed, correct))
    levels = jnp.where(parsed, jnp.where(correct, 1, 2), 3)
    return jnp.where(well_formed, levels, 4).astype(jnp.int32)


def pairs_from_levels(
    levels: jax.Array, group_ids: jax.Array | None = None, *, where: jax.Array | None = None
) -> jax.Array:
    """Which answers are preferred to which: all pairs of different levels within a group.

    Args:
      levels: Levels of the answers, [..., G], of which the lower is the better.
      group_ids: The group (prompt) of every answer, integers of the same shape; None if the last
        axis is one group.
      where: Answers to include, bool, same shape.

    Returns:
      Pairs, bool [..., G, G]: entry (i, j) says that answer i is preferred to answer j.

    Raises:
      ValueError: The shapes differ, or there is no axis.

    Source: arXiv:2504.04524.

    >>> import jax.numpy as jnp
    >>> print(pairs_from_levels(jnp.array([1, 2, 1]), jnp.array([0, 0, 7])).astype(int))
    [[0 1 0]
     [0 0 0]
     [0 0 0]]
    """
    if jnp.ndim(levels) == 0:
        raise FieldError("levels", "have an axis of answers", "a number")
    group_ids = jnp.zeros_like(levels) if group_ids is None else group_ids
    where = jnp.ones(jnp.shape(levels), bool) if where is None else where
    check_shape("group_ids", group_ids, levels)
    check_shape("where", where, levels)
    levels, group_ids, where = jnp.asarray(levels), jnp.asarray(group_ids), jnp.asarray(where) != 0
    answers = _Answers(levels, group_ids, where, where)
    return _pairs(answers, answers)


def trpa_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    reference_log_probs: jax.Array,
    levels: jax.Array,
    group_ids: jax.Array,
    mask: jax.Array,
    *,
    beta: jax.typing.ArrayLike = 0.1,
    kappa: jax.typing.ArrayLike = 2.5,
    anisotropy: str = "pair",
    log_ratio: str = "mean",
    reduction: str = "pair",
    no_pairs: str = "fallback",
    trust_coefficient: jax.typing.ArrayLike = 0.001,
    trust_region: str = "k3",
    max_kl: jax.typing.ArrayLike | None = 10.0,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Trust-region preference approximation.

    .. math::
        L &= \mathrm{mean}_{(i, j)} \left[-\log\sigma(h_{ij})\right] + c \, KL(\pi_{old}, \pi) \\
        h_{ij} &= \beta w_i (\Delta_i - \Delta_j) \;(\text{pair}), \qquad
        h_{ij} = \beta (w_i \Delta_i - w_j \Delta_j) \;(\text{response})

    The weight w is kappa for answers of level 1, and 1 for the others.

    Args:
      log_probs: Log-probabilities of the tokens, float [batch, time].
      old_log_probs: The same under the policy that sampled the answers; a constant for gradients.
      reference_log_probs: The same under the reference, which stays as it is during training; a
        constant for gradients.
      levels: Levels of the answers, 1 for the best, int [batch]; see `preference_levels`.
      group_ids: The prompt of every answer, int [batch].
      mask: Tokens of the answers, bool [batch, time]. Answers without a token are left out.
      beta: Scale beta of the preferences, > 0.
      kappa: Weight of the best answers, > 0; 1 switches the anisotropy off.
      anisotropy: What the weight belongs to: "pair", to its winner, as in the authors' code; or
        "response", to each answer, as the paper writes it, where a shift of all Delta matters.
      log_ratio: "mean" over the tokens of an answer, or "sum", as in DPO. With "sum" the same beta
        is far stronger.
      reduction: "pair", the mean over all pairs, in which prompts with many pairs weigh more, or
        "prompt", the mean over the prompts of the means over their pairs.
      no_pairs: What happens if the whole batch has no pair: "fallback", the authors' mean of
        -log sigmoid(s Delta) with s = 1 for level 1 and -1 for others, without beta; or "zero".
      trust_coefficient: Weight c of the trust region, >= 0.
      trust_region, max_kl: As in `trpa_trust_region`.
      axis_name: Axes of the mesh over which the answers are split. Pairs and tokens are counted
        over all devices, wherever the answers of a group are.

    Returns:
      The loss, [] in float32 at least.

    Raises:
      ValueError: The shapes differ, a name is unknown, or a number is out of range.

    Source: Su et al., arXiv:2504.04524, after the authors' code (commit f372585).
    """
    check_scalar("beta", beta, above=0.0)
    check_scalar("kappa", kappa, above=0.0)
    check_scalar("trust_coefficient", trust_coefficient, at_least=0.0)
    check_choice("anisotropy", anisotropy, ("pair", "response"))
    check_choice("reduction", reduction, ("pair", "prompt"))
    check_choice("no_pairs", no_pairs, ("fallback", "zero"))
    mine, everyone = _answers(
        log_probs, reference_log_probs, levels, group_ids, mask, log_ratio, axis_name
    )
    dtype = mine.delta.dtype
    beta, kappa, coefficient = (jnp.asarray(x, dtype) for x in (beta, kappa, trust_coefficient))
    scale = _scales(mine.levels, kappa)
    if anisotropy == "pair":
        h = scale[:, None] * (mine.delta[:, None] - everyone.delta[None, :])
    else:
        others = _scales(everyone.levels, kappa) * everyone.delta
        h = (scale * mine.delta)[:, None] - others[None, :]
    # A softplus, as log(sigmoid(h)) underflows; padding gives neither value nor gradient.
    pairs = _pairs(mine, everyone)
    losses = jnp.where(pairs, jax.nn.softplus(-beta * h), jnp.zeros_like(h))
    weights = pairs.astype(dtype)
    if reduction == "prompt":
        # Some of a prompt's pairs may be on other devices.
        per_answer = gathered(jnp.sum(weights, 1), axis_name)
        per_prompt = jnp.sum(jnp.where(_same_group(mine, everyone), per_answer, 0), 1)
        weights = weights / jnp.maximum(per_prompt, 1)[:, None]
    weight = summed(jnp.sum(weights), axis_name)
    loss = summed(jnp.sum(weights * losses), axis_name) / jnp.where(weight > 0, weight, 1)
    if no_pairs == "fallback":
        loss = jnp.where(weight > 0, loss, _without_pairs(mine, axis_name))
    distance = trpa_trust_region(
        log_probs, old_log_probs, mask,
        trust_region=trust_region, max_kl=max_kl, axis_name=axis_name,
    )  # fmt: skip
    return loss + coefficient * distance


def trpa_trust_region(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    mask: jax.Array,
    *,
    trust_region: str = "k3",
    max_kl: jax.typing.ArrayLike | None = 10.0,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""TRPA's distance of the policy from the one that sampled the answers.

    .. math:: K = \mathrm{mean}_t (e^d - d - 1), \quad d = \log\pi_{old} - \log\pi
              \;(\text{k3}), \qquad \sqrt{K + 1 / 4} \;(\text{root})

    To second order K is KL(pi_old || pi). Where both policies agree, its value and its gradient are
    0, and the root is 1/2.

    Args:
      log_probs: Log-probabilities of the tokens, float [batch, time].
      old_log_probs: The same under the policy that sampled them; a constant for gradients.
      mask: Tokens of the answers, bool [batch, time].
      trust_region: "k3" or "root", the authors' `use_sqrt_trkl`.
      max_kl: Bound of the KL of a token, > 0, above which it has no gradient: 10 in the authors'
        code. None leaves it free and drives back a policy that went too far.
      axis_name: Axes of the mesh over which the answers are split.

    Returns:
      The mean over all tokens, [] in float32 at least; of no token, 0 or 1/2.

    Raises:
      ValueError: The shapes differ, the form is unknown, or `max_kl` is not > 0.

    Source: arXiv:2504.04524, after the authors' code.
    """
    check_choice("trust_region", trust_region, ("k3", "root"))
    check_scalar("max_kl", max_kl, above=0.0)
    included = token_mask(log_probs, mask)
    log_probs, old_log_probs = masked(included, log_probs=log_probs, old_log_probs=old_log_probs)
    d = jax.lax.stop_gradient(old_log_probs) - log_probs
    kl = bounded_expm1(d) - d
    if max_kl is not None:
        kl = jnp.minimum(kl, jnp.asarray(max_kl, kl.dtype))
    mean = masked_mean(kl, included, axis_name=axis_name)
    return mean if trust_region == "k3" else jnp.sqrt(mean + 0.25)


def trpa_metrics(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    reference_log_probs: jax.Array,
    levels: jax.Array,
    group_ids: jax.Array,
    mask: jax.Array,
    *,
    kl_target: jax.typing.ArrayLike,
    log_ratio: str = "mean",
    axis_name: AxisName | None = None,
) -> dict[str, jax.Array]:
    r"""How far TRPA went from the policy that sampled the answers, and how its pairs stand.

    Args:
      log_probs, old_log_probs, reference_log_probs, levels, group_ids, mask, log_ratio, axis_name:
        As in `trpa_loss`.
      kl_target: The KL to the old policy that is allowed, in nats per token, > 0. TRPA itself has
        only a penalty.

    Returns:
      Constants, [] each: "trust/distance", the mean of k3 over the tokens, "trust/radius" and
      "trust/used" as in `trustjax.trust`, and of all pairs "trpa/pairs", their number,
      "trpa/margin", the mean of Delta_i - Delta_j, and "trpa/accuracy", the share of pairs where
      this is positive; both are 0 without a pair.

    Raises:
      ValueError: As `trpa_loss`, or `kl_target` is not > 0.
    """
    check_number("kl_target", kl_target, above=0.0)
    distance = trpa_trust_region(log_probs, old_log_probs, mask, max_kl=None, axis_name=axis_name)
    mine, everyone = _answers(
        log_probs, reference_log_probs, levels, group_ids, mask, log_ratio, axis_name
    )
    pairs = _pairs(mine, everyone)
    margins = mine.delta[:, None] - everyone.delta[None, :]
    number = summed(jnp.sum(pairs, dtype=margins.dtype), axis_name)
    means = {"margin": margins, "accuracy": (margins > 0).astype(margins.dtype)}
    metrics = {
        f"trpa/{name}": summed(jnp.sum(jnp.where(pairs, x, 0)), axis_name) / jnp.maximum(number, 1)
        for name, x in means.items()
    }
    metrics |= trust_metrics(jnp.asarray(kl_target, distance.dtype), distance)
    return jax.lax.stop_gradient(metrics | {"trpa/pairs": number})


class _Answers(NamedTuple):
    """Answers of one device or of all.

    Attributes:
      levels: Levels, int [answers].
      group_ids: Prompts, int [answers].
      included: Whether the answer has a token, bool [answers].
      delta: Log-ratios to the reference, float [answers]; 0 for the others.
    """

    levels: jax.Array
    group_ids: jax.Array
    included: jax.Array
    delta: jax.Array


def _answers(
    log_probs: jax.Array,
    reference_log_probs: jax.Array,
    levels: jax.Array,
    group_ids: jax.Array,
    mask: jax.Array,
    log_ratio: str,
    axis_name: AxisName | None,
) -> tuple[_Answers, _Answers]:
    """The answers of this device and those of all devices."""
    check_choice("log_ratio", log_ratio, ("mean", "sum"))
    included = token_mask(log_probs, mask)
    rows = included[:, 0]
    for name, array in {"levels": levels, "group_ids": group_ids}.items():
        if jnp.shape(array) != rows.shape:
            raise FieldError(name, f"have the shape {rows.shape}", jnp.shape(array))
    log_probs, reference = masked(
        included, log_probs=log_probs, reference_log_probs=reference_log_probs
    )
    difference = log_probs - jax.lax.stop_gradient(reference)
    if log_ratio == "mean":
        delta = masked_mean(difference, included, sequence=True)
    else:
        delta = jnp.sum(difference, -1)
    mine = _Answers(jnp.asarray(levels), jnp.asarray(group_ids), jnp.any(included, -1), delta)
    return mine, jax.tree.map(lambda x: gathered(x, axis_name), mine)


def _pairs(answers: _Answers, others: _Answers) -> jax.Array:
    """Which of `answers` are preferred to which of `others`, bool [..., answers, others]."""
    better = answers.levels[..., :, None] < others.levels[..., None, :]
    both = answers.included[..., :, None] & others.included[..., None, :]
    return better & both & _same_group(answers, others)


def _same_group(answers: _Answers, others: _Answers) -> jax.Array:
    return answers.group_ids[..., :, None] == others.group_ids[..., None, :]


def _scales(levels: jax.Array, kappa: jax.Array) -> jax.Array:
    return jnp.where(levels == 1, kappa, jnp.ones_like(kappa))


def _without_pairs(answers: _Answers, axis_name: AxisName | None) -> jax.Array:
    """The authors' loss of a batch without pairs: only the best answers are made more likely."""
    delta = answers.delta
    losses = jax.nn.softplus(jnp.where(answers.levels == 1, -delta, delta))
    losses = jnp.where(answers.included, losses, jnp.zeros_like(losses))
    number = summed(jnp.sum(answers.included, dtype=delta.dtype), axis_name)
    return summed(jnp.sum(losses), axis_name) / jnp.maximum(number, 1)
