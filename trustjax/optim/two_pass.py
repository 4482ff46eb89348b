"""The train step for optimizers that evaluate the model a second time."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from trustjax._checks import check_choice
from trustjax.optim._attack import AttackState, MissingArgumentError, PyTree, example_mean
from trustjax.optim._extra_args import check_same_parameters, dropped_by, with_extra_args
from trustjax.optim.tram import DIVERGENCES, Divergence


class StepResult(NamedTuple):
    """What a step returns; it unpacks as `params, opt_state, loss, aux`.

    Attributes:
      params: the new parameters.
      opt_state: the new optimizer state.
      loss: [] loss at the old parameters, without an attack.
      aux: auxiliary outputs of the first pass, None if there are none.
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
    """Makes a train step that gives any optimizer what it asks for: a plain one, `sam`, `tram`, ...

    All passes of a step see the same further arguments, so the same batch, the same random key and
    the same batch statistics. `aux`, with the new batch statistics in it, comes from the first pass
    alone: what the pass at the attacked weights would update is dropped.

    The optimizer gets as extra arguments `grad_fn`, `value`, `grad`, `value_fn`, `loss_fn`, and
    where there is a source for them `outputs`, `where`, `losses`, `losses_fn`, `output_fn`,
    `noisy_outputs`, `fisher_grads`, `divergence_fn`; so `natural_gradient` runs here as well. They
    reach it through every wrapper whose `update` takes keywords, `optax.MultiSteps` too. Compile
    the step with `jax.jit`: what the optimizer does not use is then not computed.

    Args:
      loss_fn: `loss_fn(params, *args)` returns the loss [] or a pair (loss, aux). Where aux is a
        mapping, its entries "outputs" (logits), "where" (mask of examples) and "losses" ([batch])
        go to the optimizer. "losses" are those of single examples whose mean, over "where", is the
        loss or a term of it: `esam` puts the mean over a selection in its place.
      tx: the optimizer.
      output_fn: `output_fn(params, *args)` returns logits, without randomness: the forward pass at
        TRAM's reference parameters.
      noisy_output_fn: the same on noised inputs, for `tram("noise")`.
      noisy_loss_fn: `noisy_loss_fn(params, *args)` returns the loss [] on noised inputs, for
        `tram_fisher`.
      divergence: for `natural_gradient`: the divergence of the present outputs from those at the
        old parameters, a name or a callable as in `tram`. Outputs are those of `output_fn`, or
        without it aux["outputs"].
      map_grads: what is done to the gradients of all passes before the optimizer sees them, such as
        a mean over devices or clipping by norm.

    Returns:
      `step(params, opt_state, *args) -> StepResult`, pure; `jax.jit(step, donate_argnums=(0, 1))`.

    Raises:
      ValueError: an unknown `divergence`; in a step, an attack that is the last of a chain, whose
        gradient would be added to the parameters as it is; an argument that the optimizer needs
        and that has no source, or that a wrapper around it dropped; parameters that a wrapper such
        as `optax.flatten` or `optax.lookahead` has changed for what it wraps.

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
    if not callable(divergence):
        check_choice("divergence", divergence, DIVERGENCES)
    measure = divergence if callable(divergence) else DIVERGENCES[divergence]
    is_optax = getattr(tx.update, "__module__", "").startswith(("optax.", "trustjax."))
    tx = with_extra_args(tx)

    def loss_and_aux(params: PyTree, *args: Any) -> tuple[jax.Array, Any]:
        result = loss_fn(params, *args)
        return result if isinstance(result, tuple) else (result, None)

    def step(params: PyTree, opt_state: optax.OptState, *args: Any) -> StepResult:
        # A wrapper of the user's own may make a step of the gradient without a state to show.
        if is_optax and _ends_in_attack(opt_state):
            raise ValueError(
                "the last transform of tx is an attack, which returns a gradient: added to the "
                "parameters it would raise the loss. An attack comes first and the optimizer "
                "after it: optax.chain(sam(...), optax.adamw(...))"
            )
        if isinstance(params, optax.LookaheadParams):
            raise ValueError(
                "params is an optax.LookaheadParams, a pair of parameters of which the loss takes "
                "one, and optax.lookahead passes no extra arguments on: give tx without it, and "
                "move the slow parameters between steps"
            )
        grad_and_loss = jax.value_and_grad(loss_and_aux, has_aux=True)
        (loss, aux), grads = grad_and_loss(params, *args)
        grads = map_grads(grads)

        def at(seen: PyTree) -> PyTree:
            """What a transform within `tx` takes for parameters of the model."""
            check_same_parameters(params, seen)
            return seen

        # The line searches of Optax want value_fn to name every extra argument, used or not.
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
            return loss_and_aux(at(params), *args)[0]

        def selected_loss(params: PyTree, where: jax.Array | None) -> jax.Array:
            loss, aux = loss_and_aux(at(params), *args)
            if where is None:
                return loss
            losses = aux["losses"]
            return loss - example_mean(losses, aux.get("where")) + example_mean(losses, where)

        extra_args: dict[str, Any] = {
            "grad_fn": lambda p, where=None: map_grads(jax.grad(selected_loss)(p, where)),
            "value": loss,
            "grad": grads,
            "value_fn": value_fn,
            "loss_fn": lambda p: loss_and_aux(at(p), *args)[0],
        }
        if isinstance(aux, Mapping):
            known = ("outputs", "where", "losses")
            extra_args |= {name: aux[name] for name in known if name in aux}
            if "losses" in aux:
                extra_args["losses_fn"] = lambda p: loss_and_aux(at(p), *args)[1]["losses"]
        if output_fn is not None:
            extra_args["output_fn"] = lambda p: output_fn(at(p), *args)
        if noisy_output_fn is not None:
            extra_args["noisy_outputs"] = noisy_output_fn(params, *args)
        if noisy_loss_fn is not None:
            extra_args["fisher_grads"] = map_grads(jax.grad(noisy_loss_fn)(params, *args))

        if output_fn is not None or "outputs" in extra_args:

            def outputs_of(params: PyTree) -> Any:
                if output_fn is not None:
                    return output_fn(params, *args)
                return loss_and_aux(params, *args)[1]["outputs"]

            old = outputs_of(params) if output_fn is not None else aux["outputs"]
            old, where = jax.lax.stop_gradient(old), extra_args.get("where")
            extra_args["divergence_fn"] = lambda p: measure(old, outputs_of(at(p)), where)

        try:
            updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        except MissingArgumentError as error:
            wrapper = dropped_by(error)
            if wrapper is None or not set(error.names) <= extra_args.keys():
                raise
            raise ValueError(
                f"{error}. two_pass_step passed {' and '.join(error.names)}, but Optax passes "
                f"extra arguments to {wrapper} only where it is an "
                "optax.GradientTransformationExtraArgs: where its update takes keywords write "
                "optax.GradientTransformationExtraArgs(wrapped.init, wrapped.update)"
            ) from error
        return StepResult(optax.apply_updates(params, updates), opt_state, loss, aux)

    return step


def _ends_in_attack(state: optax.OptState) -> bool:
    """Whether the last transform of a chain is an attack: a chain's state is a tuple of theirs."""
    if isinstance(state, AttackState):
        return True
    if type(state) is tuple and state:
        return _ends_in_attack(state[-1])
    wrapped = getattr(state, "inner_state", getattr(state, "inner_opt_state", None))
    return wrapped is not None and _ends_in_attack(wrapped)
