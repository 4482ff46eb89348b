r"""Penalties that keep a network's function close to another one: a trust region in the loss.

TRPO-style, R3F and MESA are baselines of TRAM (Sherborne et al., arXiv:2310.03646, B.2), which adds
0.1 times one of them to the loss. With p the present distribution of an example, they are:

    trpo     KL(p_previous || p)                  p_previous: the weights before the last update
    r3f      KL(p_noised || p)                    p_noised: the present weights on noised inputs
    mesa     T^2 KL(p_ema || p), at temperature T p_ema: the moving average of the weights
    smart    KL(p || p_worst) + KL(p_worst || p)  p_worst: the worst inputs near the given ones
    bregman  KL(p || p_previous) + KL(p_previous || p)

R3F is by Aghajanyan et al., arXiv:2008.03156, and MESA by Du et al., arXiv:2205.14083. The last two
belong to SMART, Jiang et al., arXiv:1911.03437. All return one value per example, in nats and in
float32 at least. The previous and the averaged function are targets, into which no gradient flows.
The gradients of R3F and SMART flow into both distributions.
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

    It is a penalty, not the constraint of TRPO.

    Args:
      logits: Logits of the present weights, float [..., classes].
      previous_logits: Logits of the weights before the last update, same shape; a target.
      where: Examples or tokens to include, bool, broadcastable to [...]. The penalty of the others
        and its gradient are 0, whatever their logits.

    Returns:
      Penalty per example in nats, [...], float32 at least, >= 0. Its value and its gradient are 0
      if the logits agree.

    Raises:
      ValueError: The shapes differ.

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
    r"""Divergence of the function on clean inputs from the function on noised inputs.

    .. math:: KL(p_{noised} \| p)

    Gradients flow through both logits.

    Args:
      logits: Logits on clean inputs, float [..., classes].
      noised_logits: Logits of the same weights on inputs plus noise, same shape. The noise of TRAM
        is normal, with standard deviation 0.1, on token embeddings.
      symmetric: Whether to add the other direction, as the authors' code in fairseq does.
      where: Examples or tokens to include, as in `trpo_penalty`.

    Returns:
      Penalty per example in nats, [...], float32 at least, >= 0.

    Raises:
      ValueError: The shapes differ.

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
    r"""Divergence of the present function from the function of the averaged weights.

    .. math:: T^2 \, KL\left(\mathrm{softmax}(z_{ema} / T) \,\|\, \mathrm{softmax}(z / T)\right)

    Args:
      logits: Logits z of the present weights, float [..., classes].
      average_logits: Logits of the moving average of the weights (decay 0.999), same shape; a
        target.
      temperature: T, > 0; 1 in TRAM's experiments, 5 in the authors' code, with weight 0.3.
      where: Examples or tokens to include, as in `trpo_penalty`.

    Returns:
      Penalty per example in nats, [...], float32 at least, >= 0.

    Raises:
      ValueError: The shapes differ, or `temperature` is not > 0.

    Source: arXiv:2310.03646, B.2; MESA, arXiv:2205.14083.
    """
    check_number("temperature", temperature, above=0.0)
    logits, target = _pair(logits, jax.lax.stop_gradient(average_logits), "average_logits", where)
    factor = jnp.asarray(temperature, logits.dtype)
    return jnp.square(factor) * kl_divergence(target / factor, logits / factor)


def smart_penalty(
    logits: jax.Array, perturbed_logits: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Symmetric divergence of the function under the worst perturbation of its inputs.

    .. math:: KL(p \| p_{worst}) + KL(p_{worst} \| p)

    Gradients flow through both logits, but not through the perturbation.

    Args:
      logits: Logits on clean inputs, float [..., classes].
      perturbed_logits: Logits on the inputs that `smart_perturbation` returns, same shape.
      where: Examples or tokens to include, as in `trpo_penalty`.

    Returns:
      Penalty per example in nats, [...], float32 at least, >= 0.

    Raises:
      ValueError: The shapes differ.

    Source: SMART, arXiv:1911.03437, the term R_s.
    """
    return symmetric_kl(*_pair(logits, perturbed_logits, "perturbed_logits", where))


def bregman_penalty(
    logits: jax.Array, previous_logits: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""SMART's proximal term: the symmetric divergence of the present and the previous function.

    .. math:: KL(p \| p_{previous}) + KL(p_{previous} \| p)

    Arguments, result and errors are those of `trpo_penalty`.

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
    r"""SMART's attack: the inputs, in a box around the given ones, where the function differs most.

    .. math:: \tilde x \approx \arg\max_{\|\tilde x - x\|_\infty \le \epsilon}
              KL(p_x \| p_{\tilde x}) + KL(p_{\tilde x} \| p_x)

    It starts at :math:`x + \sigma z` with z normal, and `steps` times takes a step
    :math:`\eta g / \|g\|_\infty` along the gradient g and projects the result into the box.

    Args:
      output_fn: `output_fn(inputs) -> logits` [..., classes], with all randomness held constant.
      inputs: Images or embeddings, a float array; in bfloat16 a small radius rounds away.
      key: Random key of the start.
      radius: Half the width of the box, epsilon, > 0, in units of the inputs.
      step_size: Length of a step, eta, > 0, in units of the inputs.
      noise: Standard deviation of the start, sigma, > 0, in units of the inputs; at the clean
        inputs the gradient would be 0.
      steps: Number of steps, >= 1.
      axis: Axes of the inputs over which the norm of g is taken.
      form: "paper", or "released" for the code of mt-dnn. It takes the gradient of
        :math:`KL(p_x \| p_{\tilde x})`, averaged over the batch, and divides it by its norm +
        1e-6; it makes one step, from the clean inputs and not from the start, and does not project.
      where: Logits to include, as in `trpo_penalty`.

    Returns:
      Inputs of the same shape and dtype, through which no gradient flows. Where g is not finite
      they are the clean ones.

    Raises:
      ValueError: A number is out of range, `form` is unknown, or "released" is given with several
        steps.

    Source: SMART, arXiv:1911.03437; step size and start are those of namisan/mt-dnn.
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

    def divergence(perturbed: jax.Array) -> jax.Array:
        outputs = output_fn(perturbed.astype(inputs.dtype))
        if form == "paper":
            return jnp.sum(smart_penalty(outputs, target, where=where))
        return jnp.sum(trpo_penalty(outputs, target, where=where)) / target.shape[0]

    # At the clean inputs the divergence has its minimum, so its gradient is 0: start beside them.
    perturbed = clean + sigma * jax.random.normal(key, clean.shape, clean.dtype)
    for _ in range(steps):
        gradient = jax.grad(divergence)(perturbed)
        norm = jnp.max(jnp.abs(gradient), axis, keepdims=True)
        if form == "released":
            direction = gradient / (norm + jnp.asarray(1e-6, norm.dtype))
        else:
            direction = gradient / jnp.where(norm > 0, norm, jnp.ones_like(norm))
        # The released code takes the gradient at the start, but steps from the clean inputs.
        start = clean if form == "released" else perturbed
        finite = jnp.isfinite(norm)
        perturbed = jnp.where(finite, start + eta * direction, clean)
        if form == "paper":  # the projection into the box
            perturbed = jnp.clip(perturbed, clean - epsilon, clean + epsilon)
    return jax.lax.stop_gradient(perturbed).astype(inputs.dtype)


def _pair(
    logits: jax.Array, other: jax.Array, name: str, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Both logits in float32 at least, and zero, hence equal, in examples that `where` excludes.

    Raises ValueError, which names `other` as `name`, if the shapes differ.
    """
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
