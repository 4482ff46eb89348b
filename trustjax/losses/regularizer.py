r"""Penalties that keep a network's function close to another one: a trust region in the loss.

TRPO-style, R3F and MESA are the baselines of TRAM (Sherborne et al., arXiv:2310.03646, B.2), which
adds 0.1 of each to the loss; with p the present distribution of an example:

    trpo     KL(p_previous || p)                  p_previous: the weights before the last update
    r3f      KL(p_noised || p)                    p_noised: the present weights on noised inputs
    mesa     T^2 KL(p_ema || p), both at temperature T         p_ema: the average of past weights
    smart    KL(p || p_worst) + KL(p_worst || p)  p_worst: on the worst inputs nearby
    bregman  KL(p || p_previous) + KL(p_previous || p)

R3F: Aghajanyan et al., arXiv:2008.03156. MESA: Du et al., arXiv:2205.14083. The last two are those
of SMART: Jiang et al., arXiv:1911.03437. All return one value per example, in nats and float32 at
least. The previous and the averaged function are targets: no gradient flows into them. R3F and
SMART pull at both sides.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_choice, check_number
from trustjax._dtypes import reduction_dtype, widened
from trustjax.geometry import kl_divergence, symmetric_kl


def trpo_penalty(
    logits: jax.Array, previous_logits: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Divergence of the present function from the previous one.

    .. math:: KL(p_{previous} \| p)

    A penalty, not the constraint of TRPO.

    Args:
      logits: [..., classes] float, of the present weights.
      previous_logits: same shape, of the weights before the last update; a target.
      where: bool, broadcastable to [...], examples or tokens to include. Elsewhere the penalty and
        its gradient are 0, whatever the logits.

    Returns:
      [...] in nats, float32 at least, >= 0; value and gradient are 0 where the logits agree.

    Raises:
      ValueError: the shapes differ.

    Source: arXiv:2310.03646, B.2.
    """
    logits, target = _pair(logits, jax.lax.stop_gradient(previous_logits), "previous_logits", where)
    return kl_divergence(target, logits)


def r3f_penalty(
    logits: jax.Array,
    noised_logits: jax.Array,
    *,
    symmetric: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Divergence of the function on clean inputs from that on noised ones.

    .. math:: KL(p_{noised} \| p)

    Gradients flow through both logits.

    Args:
      logits: [..., classes] float, on clean inputs.
      noised_logits: same shape, on inputs plus noise (TRAM: normal of deviation 0.1 on token
        embeddings), same weights.
      symmetric: add the other direction, as the authors' code in fairseq does.
      where: as in `trpo_penalty`.

    Returns:
      [...] in nats, float32 at least, >= 0.

    Raises:
      ValueError: the shapes differ.

    Source: arXiv:2310.03646, Eq. 5; R3F, arXiv:2008.03156, whose code has `symmetric=True` and
    weight 1.
    """
    logits, noised_logits = _pair(logits, noised_logits, "noised_logits", where)
    divergence = symmetric_kl if symmetric else kl_divergence
    return divergence(noised_logits, logits)


def mesa_penalty(
    logits: jax.Array,
    average_logits: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Divergence of the present function from that of the averaged weights.

    .. math:: T^2 \, KL\left(\mathrm{softmax}(z_{ema} / T) \,\|\, \mathrm{softmax}(z / T)\right)

    Args:
      logits: [..., classes] float, z, of the present weights.
      average_logits: same shape, of the moving average of the weights (decay 0.999); a target.
      temperature: T > 0; 1 in TRAM's experiments, 5 in the authors' code, with weight 0.3.
      where: as in `trpo_penalty`.

    Returns:
      [...] in nats, float32 at least, >= 0.

    Raises:
      ValueError: the shapes differ, or `temperature` is not > 0.

    Source: arXiv:2310.03646, B.2; MESA, arXiv:2205.14083.
    """
    check_number("temperature", temperature, above=0.0)
    logits, target = _pair(logits, jax.lax.stop_gradient(average_logits), "average_logits", where)
    factor = jnp.asarray(temperature, logits.dtype)
    return jnp.square(factor) * kl_divergence(target / factor, logits / factor)


def smart_penalty(
    logits: jax.Array, perturbed_logits: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""How far the function moves under the worst perturbation of its inputs.

    .. math:: KL(p \| p_{worst}) + KL(p_{worst} \| p)

    Gradients flow through both logits, not through the perturbation.

    Args:
      logits: [..., classes] float, on clean inputs.
      perturbed_logits: same shape, on the inputs that `smart_perturbation` returns.
      where: as in `trpo_penalty`.

    Returns:
      [...] in nats, float32 at least, >= 0.

    Raises:
      ValueError: the shapes differ.

    Source: SMART, arXiv:1911.03437, the term R_s.
    """
    return symmetric_kl(*_pair(logits, perturbed_logits, "perturbed_logits", where))


def bregman_penalty(
    logits: jax.Array, previous_logits: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""SMART's proximal term: divergence of the present function from the previous one, both ways.

    .. math:: KL(p \| p_{previous}) + KL(p_{previous} \| p)

    Arguments, result and errors as in `trpo_penalty`.

    Source: SMART, arXiv:1911.03437, the term D_Breg.
    """
    previous_logits = jax.lax.stop_gradient(previous_logits)
    return symmetric_kl(*_pair(logits, previous_logits, "previous_logits", where))


def smart_perturbation(
    output_fn: Callable[[jax.Array], jax.Array],
    inputs: jax.Array,
    key: jax.Array,
    *,
    radius: jax.typing.ArrayLike = 1e-3,
    step_size: jax.typing.ArrayLike = 1e-3,
    noise: jax.typing.ArrayLike = 1e-5,
    steps: int = 1,
    axis: int | tuple[int, ...] = -1,
    form: Literal["paper", "released"] = "paper",
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Inputs within a box around the given ones where the function differs most: SMART's attack.

    .. math:: \tilde x \approx \arg\max_{\|\tilde x - x\|_\infty \le \epsilon}
              KL(p_x \| p_{\tilde x}) + KL(p_{\tilde x} \| p_x)

    From :math:`x + \sigma z`, z normal, `steps` times a step :math:`\eta g / \|g\|_\infty` along
    the gradient g, then the projection into the box.

    Args:
      output_fn: `output_fn(inputs) -> logits` [..., classes], any randomness held constant.
      inputs: float array, images or embeddings; a small radius rounds away on bfloat16 ones.
      key: random key of the start.
      radius: epsilon, half the width of the box, > 0, in units of the inputs.
      step_size: eta, > 0.
      noise: sigma, > 0; at the clean inputs the gradient would be 0.
      steps: number of steps, >= 1.
      axis: axes of the inputs over which the norm of g is taken.
      form: "paper", or "released" for mt-dnn's: the gradient of :math:`KL(p_x \| p_{\tilde x})`,
        averaged over the batch, divided by its norm + 1e-6; one step from the clean inputs, not
        from the start; no projection.
      where: as in `trpo_penalty`, for logits that do not count.

    Returns:
      Inputs of the same shape and dtype; no gradient flows through them. Where g is not finite they
      are the clean ones.

    Raises:
      ValueError: a number out of range, an unknown `form`, "released" with several steps.

    Source: SMART, arXiv:1911.03437; numbers of the step and of the start as in namisan/mt-dnn.
    """
    for name, number in {"radius": radius, "step_size": step_size, "noise": noise}.items():
        check_number(name, number, above=0.0)
    check_number("steps", steps, at_least=1)
    check_choice("form", form, ("paper", "released"))
    if form == "released" and steps != 1:
        raise FieldError("steps", "be 1 with form='released'", steps)

    inputs = jax.lax.stop_gradient(inputs)
    clean = widened(inputs)
    target = jax.lax.stop_gradient(output_fn(inputs))
    sigma, eta, epsilon = (jnp.asarray(x, clean.dtype) for x in (noise, step_size, radius))

    def divergence(moved: jax.Array) -> jax.Array:
        outputs = output_fn(moved.astype(inputs.dtype))
        if form == "paper":
            return jnp.sum(smart_penalty(outputs, target, where=where))
        return jnp.sum(trpo_penalty(outputs, target, where=where)) / target.shape[0]

    moved = clean + sigma * jax.random.normal(key, clean.shape, clean.dtype)
    for _ in range(steps):
        gradient = jax.grad(divergence)(moved)
        norm = jnp.max(jnp.abs(gradient), axis, keepdims=True)
        if form == "released":
            direction = gradient / (norm + jnp.asarray(1e-6, norm.dtype))
        else:
            direction = gradient / jnp.where(norm > 0, norm, jnp.ones_like(norm))
        start = clean if form == "released" else moved
        finite = jnp.isfinite(norm)
        moved = jnp.where(finite, start + eta * direction, clean)
        if form == "paper":
            moved = jnp.clip(moved, clean - epsilon, clean + epsilon)
    return jax.lax.stop_gradient(moved).astype(inputs.dtype)


def _pair(
    logits: jax.Array, other: jax.Array, name: str, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Both in float32 at least, and zero, thus equal, in the examples that `where` leaves out."""
    logits, other = jnp.asarray(logits), jnp.asarray(other)
    if logits.shape != other.shape:
        raise ValueError(
            f"logits and {name} must have the same shape, got {logits.shape} and {other.shape}"
        )
    dtype = reduction_dtype((logits, other))
    logits, other = logits.astype(dtype), other.astype(dtype)
    if where is None:
        return logits, other
    included = jnp.expand_dims(jnp.broadcast_to(where, logits.shape[:-1]), -1)
    zeros = jnp.zeros_like(logits)
    return jnp.where(included, logits, zeros), jnp.where(included, other, zeros)
