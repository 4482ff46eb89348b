r"""The losses of DPO's family as one table: `dpo_loss`. See `preference` for what they share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_choice, check_scalar
from trustjax._sharding import AxisName
from trustjax.losses._pairs import both_or_none, bounded_expm1, length_normalised, rows, smoothed


class _Pairs(NamedTuple):
    """What the variants of `dpo_loss` see of the pairs; arrays [...].

    Attributes:
      chosen: Scores of the chosen answers: a_w, or f'(exp(a_w)) of an f-divergence.
      rejected: Scores of the rejected answers.
      policy: log pi(y_w | x) - log pi(y_l | x).
      reference: log pi_ref(y_w | x) - log pi_ref(y_l | x).
      beta: Weight beta.
      label_smoothing: The share eps of labels that are wrong.
      discopop_tau: Temperature of DiscoPOP's modulation.
      where: Pairs to include.
      axis_name: Mesh axes over which the pairs are split.
    """

    chosen: jax.Array
    rejected: jax.Array
    policy: jax.Array
    reference: jax.Array
    beta: jax.Array
    label_smoothing: jax.Array
    discopop_tau: jax.Array
    where: jax.Array
    axis_name: AxisName | None

    @property
    def logit(self) -> jax.Array:
        """beta D: the log-odds that the model gives to the label."""
        return self.beta * (self.chosen - self.rejected)


def _sigmoid(pairs: _Pairs) -> jax.Array:
    return smoothed(pairs.logit, pairs.label_smoothing)


def _robust(pairs: _Pairs) -> jax.Array:
    # Unbiased under labels that are flipped with probability eps, hence unbounded below.
    epsilon = pairs.label_smoothing
    right, wrong = jax.nn.log_sigmoid(pairs.logit), jax.nn.log_sigmoid(-pairs.logit)
    return (epsilon * wrong - (1 - epsilon) * right) / (1 - 2 * epsilon)


def _hinge(pairs: _Pairs) -> jax.Array:
    return jax.nn.relu(1 - pairs.logit)


def _ipo(pairs: _Pairs) -> jax.Array:
    return jnp.square(pairs.chosen - pairs.rejected - 1 / (2 * pairs.beta))


def _exo_pair(pairs: _Pairs) -> jax.Array:
    # KL(model || smoothed label), the reverse of cDPO's.
    x, epsilon = pairs.logit, pairs.label_smoothing
    right = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - jnp.log1p(-epsilon))
    return right + jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - jnp.log(epsilon))


def _nca_pair(pairs: _Pairs) -> jax.Array:
    chosen, rejected = pairs.beta * pairs.chosen, pairs.beta * pairs.rejected
    negative = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * negative


def _bco_pair(pairs: _Pairs) -> jax.Array:
    chosen, rejected = pairs.beta * pairs.chosen, pairs.beta * pairs.rejected
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def _sppo_hard(pairs: _Pairs) -> jax.Array:
    target = 0.5 / pairs.beta
    return jnp.square(pairs.chosen - target) + jnp.square(pairs.rejected + target)


def _apo_zero(pairs: _Pairs) -> jax.Array:
    chosen, rejected = pairs.beta * pairs.chosen, pairs.beta * pairs.rejected
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def _apo_down(pairs: _Pairs) -> jax.Array:
    return jax.nn.sigmoid(pairs.beta * pairs.chosen) + jax.nn.sigmoid(-pairs.logit)


def _discopop(pairs: _Pairs) -> jax.Array:
    x, modulation = pairs.logit, pairs.logit / pairs.discopop_tau
    logistic = -jax.nn.sigmoid(-modulation) * jax.nn.log_sigmoid(x)
    # sigmoid(x / tau) exp(-x) as one exponential, because 0 times infinity would be NaN.
    return logistic + 1 + bounded_expm1(jax.nn.log_sigmoid(modulation) - x)


def _aot(pairs: _Pairs) -> jax.Array:
    return _transported(pairs.policy, pairs.reference, pairs)


def _aot_unpaired(pairs: _Pairs) -> jax.Array:
    return _transported(pairs.chosen, pairs.rejected, pairs)


def _transported(upper: jax.Array, lower: jax.Array, pairs: _Pairs) -> jax.Array:
    """DPO's loss between the k-th smallest of `upper` and the k-th smallest of `lower`.

    The k-th included pair, in the order of the batch, gets the loss of rank k.
    """
    shape, where = pairs.where.shape, pairs.where.ravel()
    every, offset = where, jnp.asarray(0)
    upper, lower = upper.ravel(), lower.ravel()
    if pairs.axis_name is not None:
        upper, lower, every = jax.lax.all_gather((upper, lower, where), pairs.axis_name, tiled=True)
        offset = jax.lax.axis_index(pairs.axis_name) * where.size
    # The excluded come last. A sentinel among the values would not do, as NaN sorts behind it.
    margins = (x[jnp.lexsort((x, ~every))] for x in (upper, lower))
    losses = smoothed(pairs.beta * (next(margins) - next(margins)), pairs.label_smoothing)
    ranks = jax.lax.dynamic_slice_in_dim(jnp.cumsum(every), offset, where.size) - 1
    return losses[jnp.maximum(ranks, 0)].reshape(shape)


class _Variant(NamedTuple):
    """A row of the table of `dpo_loss`.

    Attributes:
      loss: Losses of the pairs.
      smoothing: Bounds of `label_smoothing`; None if the variant does not read it.
      reads: Names of the other options that the variant reads.
      requires: Options without which the variant is not defined.
    """

    loss: Callable[[_Pairs], jax.Array]
    smoothing: dict[str, float] | None = None
    reads: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()


# The normaliser of an f-divergence cancels only in the difference of both scores, so only losses
# of this difference read it.
_DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")
_LENGTHS = ("chosen_lengths", "rejected_lengths")
_SHARE = {"at_least": 0.0, "at_most": 1.0}

_VARIANTS = {
    "sigmoid": _Variant(_sigmoid, _SHARE, _DIVERGENCE),
    "robust": _Variant(_robust, {"at_least": 0.0, "below": 0.5}, _DIVERGENCE),
    "hinge": _Variant(_hinge, None, _DIVERGENCE),
    "ipo": _Variant(_ipo, None, _DIVERGENCE + _LENGTHS),
    "sigmoid_norm": _Variant(_sigmoid, None, _DIVERGENCE + _LENGTHS, _LENGTHS),
    "exo_pair": _Variant(_exo_pair, {"above": 0.0, "below": 1.0}, _DIVERGENCE),
    "nca_pair": _Variant(_nca_pair),
    "bco_pair": _Variant(_bco_pair),
    "sppo_hard": _Variant(_sppo_hard),
    "apo_zero": _Variant(_apo_zero),
    "apo_down": _Variant(_apo_down),
    "discopop": _Variant(_discopop, None, (*_DIVERGENCE, "discopop_tau")),
    "aot": _Variant(_aot, _SHARE, ("axis_name",)),
    "aot_unpaired": _Variant(_aot_unpaired, _SHARE, ("axis_name",)),
}


def _alpha_scores(log_ratio: jax.Array, alpha: jax.Array) -> jax.Array:
    # (t^(alpha - 1) - 1) / (alpha - 1), whose limit at alpha = 1 is log t.
    power = alpha - 1
    is_log = jnp.abs(power) < 1e-6
    power = jnp.where(is_log, jnp.ones_like(power), power)
    return jnp.where(is_log, log_ratio, bounded_expm1(power * log_ratio) / power)


# f'(t) at t = pi / pi_ref, from a = log t.
_SCORES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "reverse_kl": lambda a, alpha: a,
    "forward_kl": lambda a, alpha: -bounded_expm1(-a),
    "js_divergence": lambda a, alpha: jnp.log(2.0).astype(a.dtype) + jax.nn.log_sigmoid(a),
    "alpha_divergence": _alpha_scores,
}


def dpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array | None,
    reference_rejected: jax.Array | None,
    *,
    beta: jax.typing.ArrayLike,
    variant: str = "sigmoid",
    label_smoothing: jax.typing.ArrayLike = 0.0,
    chosen_lengths: jax.Array | None = None,
    rejected_lengths: jax.Array | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: jax.typing.ArrayLike | None = None,
    discopop_tau: jax.typing.ArrayLike | None = None,
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Direct preference optimisation, in the variants and under the names of TRL 1.16.

    .. math:: -\log\sigma(\beta D), \qquad D = a_w - a_l, \quad
              a = \log\pi(y | x) - \log\pi_{ref}(y | x)

    With S the logistic function and eps = `label_smoothing`, the variants are:

    - "sigmoid": -(1 - eps) log S(beta D) - eps log S(-beta D), DPO, and cDPO for eps > 0.
    - "robust": (-(1 - eps) log S(beta D) + eps log S(-beta D)) / (1 - 2 eps), eps < 1/2.
    - "hinge": max(0, 1 - beta D), SLiC.
    - "ipo": (D - 1 / (2 beta))^2, with a per token if lengths are given, as in TRL.
    - "sigmoid_norm": "sigmoid" with a per token.
    - "exo_pair": KL((S(beta D), S(-beta D)) || (1 - eps, eps)), eps > 0; the paper's is 1e-3.
    - "nca_pair": -log S(beta a_w) - log S(-beta a_w) / 2 - log S(-beta a_l) / 2.
    - "bco_pair": -log S(beta a_w) - log S(-beta a_l), without a running mean of the rewards.
    - "sppo_hard": (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2.
    - "apo_zero": 1 - S(beta a_w) + S(beta a_l).
    - "apo_down": S(beta a_w) + 1 - S(beta D).
    - "discopop": -(1 - m) log S(beta D) + m exp(-beta D), m = S(beta D / tau).
    - "aot": cDPO between equal ranks of log pi(y_w) - log pi(y_l) and of the same difference of
      the reference, over the whole batch. The k-th pair gets the loss of rank k, from the smallest.
    - "aot_unpaired": the same between the ranks of a_w and of a_l.

    An option that the variant does not read is an error.

    Args:
      policy_chosen: log pi(y_w | x), summed over the tokens of the answer, float [...].
      policy_rejected: log pi(y_l | x), same shape.
      reference_chosen: log pi_ref(y_w | x), same shape; a constant for gradients. None, for both
        references, stands for one that gives all answers the same probability.
      reference_rejected: log pi_ref(y_l | x), same shape; a constant for gradients.
      beta: Weight beta of the reference, > 0; the papers' common value is 0.1. For "ipo" it is tau
        of the paper.
      variant: One of the names above.
      label_smoothing: Share eps of labels that are wrong, for "sigmoid", "robust", "exo_pair" and
        both of AOT.
      chosen_lengths: Numbers of tokens of y_w, [...], for "ipo" and "sigmoid_norm". Without
        lengths, "ipo" takes the sums, as Eq. 17 of its paper.
      rejected_lengths: Numbers of tokens of y_l.
      f_divergence_type: Divergence from the reference: "reverse_kl", "forward_kl",
        "js_divergence" or "alpha_divergence", for losses of D: the scores f'(exp(a)) take the place
        of a, which are a, 1 - exp(-a), log 2 + log S(a) and (exp((alpha - 1) a) - 1) / (alpha - 1).
      f_alpha_divergence_coef: alpha of "alpha_divergence"; 0.5 if None.
      discopop_tau: Temperature tau of "discopop", > 0; 0.05 if None.
      where: Pairs to include, bool, the shape of the first argument.
      axis_name: Axes of the mesh over which the pairs are split, for AOT, which sorts all of them.
        Every device returns the losses of its own part.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: The shapes differ, a name is unknown, a number is out of range, or an option is
        missing or not read by the variant.

    Source: DPO arXiv:2305.18290, Eq. 7; cDPO, a note by E. Mitchell; robust 2403.00409; SLiC
    2305.10425; IPO 2310.12036, Eq. 17; sigmoid_norm 2411.15124; EXO 2402.00856, Eq. 16; NCA
    2402.05369; BCO 2404.04656; SPPO 2405.00675; APO 2408.06266, Eq. 7 and 8; DiscoPOP 2406.08414,
    Eq. 5; AOT 2406.05882; f-divergences 2309.16240.

    >>> import jax.numpy as jnp
    >>> each = [jnp.array(x) for x in ([-12.0], [-14.0], [-13.0], [-13.5])]
    >>> print(dpo_loss(*each, beta=0.1).round(4))
    [0.621]
    """
    check_choice("variant", variant, _VARIANTS)
    check_choice("f_divergence_type", f_divergence_type, _SCORES)
    check_scalar("beta", beta, above=0.0)
    options = {
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "f_divergence_type": None if f_divergence_type == "reverse_kl" else f_divergence_type,
        "f_alpha_divergence_coef": f_alpha_divergence_coef,
        "discopop_tau": discopop_tau,
        "axis_name": axis_name,
    }
    _check_options(variant, label_smoothing, options)
    if (reference_chosen is None) != (reference_rejected is None):
        raise FieldError("reference_rejected", "be given if and only if reference_chosen is", "one")
    if reference_chosen is None or reference_rejected is None:
        reference_chosen, reference_rejected = 2 * (jnp.zeros_like(policy_chosen),)
    if f_alpha_divergence_coef is not None and f_divergence_type != "alpha_divergence":
        raise FieldError(
            "f_alpha_divergence_coef", "be left out without alpha_divergence",
            f_alpha_divergence_coef,
        )  # fmt: skip
    included, (policy_w, policy_l, reference_w, reference_l) = rows(
        where,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    reference_w, reference_l = jax.lax.stop_gradient((reference_w, reference_l))
    dtype = policy_w.dtype
    alpha = jnp.asarray(0.5 if f_alpha_divergence_coef is None else f_alpha_divergence_coef, dtype)
    score = _SCORES[f_divergence_type]
    losses = _VARIANTS[variant].loss(
        _Pairs(
            length_normalised(
                score(policy_w - reference_w, alpha), chosen_lengths, "chosen_lengths"
            ),
            length_normalised(
                score(policy_l - reference_l, alpha), rejected_lengths, "rejected_lengths"
            ),
            policy_w - policy_l,
            reference_w - reference_l,
            jnp.asarray(beta, dtype),
            jax.lax.stop_gradient(jnp.asarray(label_smoothing, dtype)),
            jnp.asarray(0.05 if discopop_tau is None else discopop_tau, dtype),
            included,
            axis_name,
        )
    )
    return jnp.where(included, losses, jnp.zeros_like(losses))


def _check_options(
    variant: str, label_smoothing: jax.typing.ArrayLike, options: dict[str, Any]
) -> None:
    """Raises FieldError unless the variant has what it requires and reads what is given."""
    row = _VARIANTS[variant]
    advice = f"variant {variant!r} does not read it"
    # Without smoothing, 0 says what the variant does anyway; all else would be ignored.
    check_scalar("label_smoothing", label_smoothing, **(row.smoothing or _SHARE))
    is_zero = not isinstance(label_smoothing, jax.core.Tracer) and np.all(
        np.asarray(label_smoothing) == 0
    )
    if row.smoothing is None and not is_zero:
        raise FieldError("label_smoothing", "be 0", label_smoothing, advice=advice)
    for name, value in options.items():
        if value is not None and name not in row.reads:
            raise FieldError(name, "be left out", value, advice=advice)
        if value is None and name in row.requires:
            raise FieldError(name, f"be given for variant {variant!r}", value)
    both_or_none(options["chosen_lengths"], options["rejected_lengths"])
    check_scalar("discopop_tau", options["discopop_tau"], above=0.0)
