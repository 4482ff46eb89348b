"""The train step for optimizers that evaluate the model a second time."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from trustjax.optim._attack import AttackState, MissingArgumentError, PyTree, example_mean
from trustjax.optim._extra_args import check_same_parameters, dropped_by, with_extra_args
from trustjax.optim.tram import Divergence, divergence_by_name

LossAndAux = Callable[[PyTree], tuple[jax.Array, Any]]


class StepResult(NamedTuple):
    """The result of a step; it unpacks as `params, opt_state, loss, aux`.

    Attributes:
      params: New parameters.
      opt_state: New optimizer state.
      loss: Loss at the old parameters without an attack, [].
      aux: Auxiliary outputs of the first pass; None if there are none.
    """

    params: PyTree
    opt_state: optax.OptState
    loss: jax.Array
    aux: Any


def two_pass_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    output_fn: Callable[..., Any] | None = None,
    noisy_output_fn: Callable[..., Any] | None = None,
    noisy_loss_fn: Callable[..., jax.Array] | None = None,
    divergence: str | Divergence = "kl",
    map_grads: Callable[[PyTree], PyTree] = lambda grads: grads,
) -> Callable[..., StepResult]:
    """Makes a train step that gives any optimizer, plain or with an attack, what it asks for.

    All passes of a step get the same further arguments: the same batch, random key and batch
    statistics. `aux`, with the new batch statistics in it, comes from the first pass alone; the
    updates that a pass at the attacked weights would make are dropped.

    The optimizer gets the extra arguments `grad_fn`, `value`, `grad`, `value_fn` and `loss_fn`, and
    if there is a source for them `outputs`, `where`, `losses`, `losses_fn`, `output_fn`,
    `noisy_outputs`, `fisher_grads` and `divergence_fn`, so `natural_gradient` works as well. They
    reach it through every wrapper whose `update` takes keywords, `optax.MultiSteps` too. Compile
    the step with `jax.jit`, which leaves out what the optimizer does not use.

    Args:
      loss_fn: `loss_fn(params, *args)` returns the loss [] or a pair (loss, aux). If aux is a
        mapping, its entries "outputs" (logits), "where" (mask of examples) and "losses" ([batch])
        go to the optimizer. "losses" are the losses of single examples, whose mean over "where" is
        the loss or a term of it; `esam` puts the mean over its selection in the place of that mean.
      tx: The optimizer.
      output_fn: `output_fn(params, *args)` returns logits without randomness: the forward pass at
        TRAM's reference parameters.
      noisy_output_fn: The same on noised inputs, for `tram("noise")`.
      noisy_loss_fn: `noisy_loss_fn(params, *args)` returns the loss [] on noised inputs, for
        `tram_fisher`.
      divergence: Divergence of the outputs from those at the old parameters, for
        `natural_gradient`; a name or a callable as in `tram`. The outputs are those of `output_fn`,
        or aux["outputs"] without one.
      map_grads: Function that every gradient goes through before the optimizer sees it, such as a
        mean over devices or a clip by norm.

    Returns:
      A pure function `step(params, opt_state, *args) -> StepResult`, to be compiled as
      `jax.jit(step, donate_argnums=(0, 1))`.

    Raises:
      ValueError: `divergence` is unknown; in a step, an attack is the last of a chain, so that its
        gradient would be added to the parameters as it is; an argument that the optimizer needs has
        no source, or a wrapper dropped it; a wrapper such as `optax.flatten` or `optax.lookahead`
        has changed the parameters for the transform inside of it.

    >>> import jax, jax.numpy as jnp, optax
    >>> from trustjax.optim import tram
    >>> def output_fn(params, batch, key):
    ...     return batch["x"] @ params
    >>> def loss_fn(params, batch, key):
    ...     keep = jax.random.bernoulli(key, 0.9, batch["x"].shape)
    ...     logits = (keep * batch["x"] / 0.9) @ params
    ...     losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    ...     return losses.mean(), {"outputs": logits}
    >>> tx = optax.chain(tram("previous"), optax.adamw(1e-2))
    >>> step = jax.jit(two_pass_step(loss_fn, tx, output_fn=output_fn))
    >>> params = jnp.array([[0.6, -0.2], [0.05, 0.4]])
    >>> opt_state = tx.init(params)
    >>> batch = {"x": jnp.array([[1.0, 2.0], [-1.0, 0.5]]), "y": jnp.array([0, 1])}
    >>> for key in jax.random.split(jax.random.key(0), 3):
    ...     params, opt_state, loss, aux = step(params, opt_state, batch, key)
    """
    measure = divergence_by_name(divergence)
    # A wrapper of the user's own may make a step of the gradient without a state to show.
    is_optax = getattr(tx.update, "__module__", "").startswith(("optax.", "trustjax."))
    tx = with_extra_args(tx)

    def loss_and_aux(params: PyTree, *args: Any) -> tuple[jax.Array, Any]:
        result = loss_fn(params, *args)
        return result if isinstance(result, tuple) else (result, None)

    def step(params: PyTree, opt_state: optax.OptState, *args: Any) -> StepResult:
        _check_step(params, opt_state if is_optax else None)
        # First pass: loss, auxiliary outputs and gradient at the clean weights.
        (loss, aux), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(params, *args)
        grads = map_grads(grads)

        def on_batch(function: Callable[..., Any]) -> Callable[[PyTree], Any]:
            """`function(params, *args)` on the batch of this step, for the parameters of `tx`."""

            def of_params(seen: PyTree) -> Any:
                check_same_parameters(params, seen)
                return function(seen, *args)

            return of_params

        # Further passes on the same batch, each made where the optimizer calls for it.
        evaluate = on_batch(loss_and_aux)
        extra_args: dict[str, Any] = {
            "value": loss,
            "grad": grads,
            "grad_fn": _grad_fn(evaluate, map_grads),
            "value_fn": _value_fn(evaluate),
            "loss_fn": lambda p: evaluate(p)[0],
        }
        if isinstance(aux, Mapping):
            known = ("outputs", "where", "losses")
            extra_args |= {name: aux[name] for name in known if name in aux}
            if "losses" in aux:
                extra_args["losses_fn"] = lambda p: evaluate(p)[1]["losses"]
        if output_fn is not None:
            extra_args["output_fn"] = on_batch(output_fn)
        # Passes on noised inputs, at the clean weights.
        if noisy_output_fn is not None:
            extra_args["noisy_outputs"] = noisy_output_fn(params, *args)
        if noisy_loss_fn is not None:
            extra_args["fisher_grads"] = map_grads(jax.grad(noisy_loss_fn)(params, *args))
        if output_fn is not None or "outputs" in extra_args:
            extra_args["divergence_fn"] = _divergence_fn(measure, params, extra_args, evaluate)

        updates, opt_state = _update(tx, grads, opt_state, params, extra_args)
        return StepResult(optax.apply_updates(params, updates), opt_state, loss, aux)

    return step


def _check_step(params: PyTree, opt_state: optax.OptState) -> None:
    """Raises ValueError for an optimizer that ends in an attack, and for parameters in pairs."""
    if _ends_in_attack(opt_state):
        raise ValueError(
            "the last transform of tx is an attack, which returns a gradient: added to the "
            "parameters it would raise the loss. Put the attack first and the optimizer after it: "
            "optax.chain(sam(...), optax.adamw(...))"
        )
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "params is an optax.LookaheadParams, a pair of parameters of which the loss takes one, "
            "and optax.lookahead does not pass extra arguments on: give tx without it, and move "
            "the slow parameters between steps"
        )


def _grad_fn(evaluate: LossAndAux, map_grads: Callable[[PyTree], PyTree]) -> Callable[..., PyTree]:
    """`grad_fn(params, where=None)`: the gradient on the batch, or on its examples in `where`."""

    def selected_loss(params: PyTree, where: jax.Array | None) -> jax.Array:
        loss, aux = evaluate(params)
        if where is None:
            return loss
        losses = aux["losses"]
        # The mean over the batch is replaced in the loss, whose other terms stay.
        return loss - example_mean(losses, aux.get("where")) + example_mean(losses, where)

    return lambda params, where=None: map_grads(jax.grad(selected_loss)(params, where))


def _value_fn(evaluate: LossAndAux) -> Callable[..., jax.Array]:
    """`value_fn(params, ...)`: the loss, for the line searches of Optax.

    They want it to name every extra argument, used or not.
    """

    def value_fn(
        params: PyTree,
        *,
        grad_fn: object = None,
        outputs: object = None,
        where: object = None,
        losses: object = None,
        losses_fn: object = None,
        output_fn: object = None,
        noisy_outputs: object = None,
        fisher_grads: object = None,
        loss_fn: object = None,
        divergence_fn: object = None,
    ) -> jax.Array:
        return evaluate(params)[0]

    return value_fn


def _divergence_fn(
    measure: Divergence, params: PyTree, extra_args: Mapping[str, Any], evaluate: LossAndAux
) -> Callable[[PyTree], jax.Array]:
    """`divergence_fn(new_params)`: the divergence of the outputs from those at `params`."""
    output_fn, where = extra_args.get("output_fn"), extra_args.get("where")
    if output_fn is not None:
        old_outputs = output_fn(params)
    else:
        old_outputs, output_fn = extra_args["outputs"], lambda p: evaluate(p)[1]["outputs"]
    old_outputs = jax.lax.stop_gradient(old_outputs)
    return lambda new_params: measure(old_outputs, output_fn(new_params), where)


def _update(
    tx: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    opt_state: optax.OptState,
    params: PyTree,
    extra_args: Mapping[str, Any],
) -> tuple[PyTree, optax.OptState]:
    """`tx.update`, whose error for a dropped argument names the wrapper that dropped it."""
    try:
        result: tuple[PyTree, optax.OptState] = tx.update(grads, opt_state, params, **extra_args)
        return result
    except MissingArgumentError as error:
        wrapper = dropped_by(error)
        if wrapper is None or not set(error.names) <= extra_args.keys():
            raise
        raise ValueError(
            f"{error}. two_pass_step passed {' and '.join(error.names)}, but Optax passes "
            f"extra arguments to {wrapper} only if it is an "
            "optax.GradientTransformationExtraArgs. If its update takes keywords, write "
            "optax.GradientTransformationExtraArgs(wrapped.init, wrapped.update)"
        ) from error


def _ends_in_attack(state: optax.OptState) -> bool:
    """Whether the last transform of a chain, whose state is a tuple of states, is an attack."""
    if isinstance(state, AttackState):
        return True
    if type(state) is tuple and state:
        return _ends_in_attack(state[-1])
    wrapped = getattr(state, "inner_state", getattr(state, "inner_opt_state", None))
    return wrapped is not None and _ends_in_attack(wrapped)
