"""The orders in a chain and the recipes for other trainers of docs/methods/sam.md."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from problems import QUADRATIC, SOFTMAX, array, quadratic

from trustjax.optim import alternating, clean_params, sam, tram

W = np.array(QUADRATIC["w"], np.float32)
GRAD = jax.grad(quadratic)
NAN = jnp.full(2, jnp.nan)

# ---- which order guards what


def nan(_):
    return NAN


def moments(state):
    """The moments of Adam, which are zero before its first step."""
    return np.stack([optax.tree.get(state, "mu"), optax.tree.get(state, "nu")])


def one_call(tx, gradient, grad_fn, state=None):
    return jax.jit(lambda g, s: tx.update(g, s, W, grad_fn=grad_fn))(
        gradient, tx.init(W) if state is None else state
    )


def test_apply_if_finite_around_the_chain_guards_the_first_gradient():
    """`on_nonfinite` guards the second gradient, with a step of the base optimizer in its place."""
    tx = optax.apply_if_finite(optax.chain(sam(0.05), optax.adam(0.1)), 3)
    updates, state = one_call(tx, NAN, GRAD)
    np.testing.assert_array_equal(updates, [0, 0])
    assert not moments(state).any()
    updates, state = one_call(tx, GRAD(W), nan)
    expected, plain = one_call(optax.adam(0.1), GRAD(W), None)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    np.testing.assert_allclose(moments(state), moments(plain), rtol=1e-6)
    assert optax.tree.get(state, "nonfinite_count") == 1
    assert state.total_notfinite == 0
    # What it does not guard.
    tx = optax.apply_if_finite(optax.chain(sam(0.05, on_nonfinite="propagate"), optax.adam(0.1)), 3)
    assert np.isnan(moments(one_call(tx, GRAD(W), nan)[1])).all()


@pytest.mark.parametrize(("gradient", "grad_fn"), [(NAN, nan), (GRAD(W), nan)])
def test_apply_if_finite_around_the_base_guards_both(gradient, grad_fn):
    """With "propagate" a broken second pass makes no step, and the attack counts it."""
    tx = optax.chain(sam(0.05, on_nonfinite="propagate"), optax.apply_if_finite(optax.adam(0.1), 3))
    updates, state = one_call(tx, gradient, grad_fn)
    np.testing.assert_array_equal(updates, [0, 0])
    assert not moments(state).any()
    assert state[1].total_notfinite == 1
    assert state[0].nonfinite_count == int(np.isfinite(gradient).all())


def test_clipping_behind_the_attack_clips_the_second_gradient():
    """Clipping before the attack leaves its length as it is, and the second gradient too."""
    lengths, attacks = {}, {}
    for name, chain in {
        "behind": (sam(0.05), optax.clip_by_global_norm(1.0)),
        "in front": (optax.clip_by_global_norm(1.0), sam(0.05)),
        "without": (sam(0.05),),
    }.items():
        gradient, state = one_call(optax.chain(*chain), GRAD(W), GRAD)
        lengths[name], attacks[name] = np.linalg.norm(gradient), optax.tree.get(state, "distance")
    assert lengths["behind"] == pytest.approx(1.0, rel=1e-5)
    assert lengths["in front"] == pytest.approx(lengths["without"], rel=1e-5)
    assert lengths["without"] > 5
    assert list(attacks.values()) == pytest.approx([0.05] * 3)


def test_accumulation_skips_what_it_sees():
    """Around the chain it sees the first gradients, and before the base the second ones."""
    skip = {"should_skip_update_fn": optax.skip_not_finite}
    propagate = sam(0.05, on_nonfinite="propagate")
    around = optax.MultiSteps(optax.chain(propagate, optax.adam(0.1)), 2, **skip)
    _, state = one_call(around, NAN, GRAD)
    assert state.mini_step == 0
    # A broken second pass of a call that makes no step breaks its zero update.
    updates, state = one_call(around, GRAD(W), nan)
    assert state.mini_step == 1
    assert np.isnan(updates).all()
    around = optax.MultiSteps(optax.chain(sam(0.05), optax.adam(0.1)), 2, **skip)
    updates, _ = one_call(around, GRAD(W), nan)
    np.testing.assert_array_equal(updates, [0, 0])

    behind = optax.MultiSteps(optax.adam(0.1), 2, **skip).gradient_transformation()
    updates, state = one_call(optax.chain(propagate, behind), GRAD(W), nan)
    np.testing.assert_array_equal(updates, [0, 0])
    assert state[1].mini_step == 0


@pytest.mark.parametrize("broken_call", [0, 1])
def test_alternating_with_both_parts_guarded(broken_call):
    """A broken pair makes no step or a plain one, odd calls stay odd, and nothing is lost."""
    tx = alternating(optax.apply_if_finite(sam(0.05), 3), optax.apply_if_finite(optax.adam(0.1), 3))
    call = jax.jit(tx.update)
    w, state = W, tx.init(W)
    for number in range(2):
        updates, state = call(NAN if number == broken_call else GRAD(w), state, w)
        w = w + updates
    assert not state.pending
    assert np.isfinite(moments(state)).all()
    expected = W if broken_call else W + one_call(optax.adam(0.1), GRAD(W), None)[0]
    np.testing.assert_allclose(w, expected, rtol=1e-6)
    np.testing.assert_array_equal(clean_params(state, w), w)


# ---- trainers that pass no arguments on


def test_train_state():
    """Flax's own apply_gradients takes further arguments as attributes; this one passes them on."""

    class TrainState(train_state.TrainState):
        def apply_gradients(self, *, grads, **extra_args):
            updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra_args)
            params = optax.apply_updates(self.params, updates)
            return self.replace(step=self.step + 1, params=params, opt_state=opt_state)

    tx = optax.chain(sam(0.05), optax.sgd(QUADRATIC["learning_rate"]))
    params, grad_fn = {"w": W}, jax.grad(lambda params: quadratic(params["w"]))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)

    @jax.jit
    def train_step(state):
        return state.apply_gradients(grads=grad_fn(state.params), grad_fn=grad_fn)

    state = train_step(state)
    np.testing.assert_allclose(state.params["w"], QUADRATIC["sam"]["new_w"], rtol=1e-6)
    assert state.step == 1
    theirs = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    with pytest.raises(ValueError, match=r"sam needs grad_fn.*TrainState\.apply_gradients"):
        theirs.apply_gradients(grads=grad_fn(params), grad_fn=grad_fn)


class Linear(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(array(SOFTMAX["w"]))

    def __call__(self, x):
        return x @ self.w[...]


def test_nnx_with_tram():
    """The steps are those on the bare weights, radius included."""
    x, y = array(SOFTMAX["x"]), jnp.array(SOFTMAX["y"])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    tx = optax.chain(tram("previous"), optax.sgd(SOFTMAX["learning_rate"]))

    @nnx.jit
    def train_step(model, optimizer, x, y):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def output_fn(params):
            return nnx.merge(graph, params, rest, copy=True)(x)

        def loss_fn(params):
            logits = output_fn(params)
            return cross_entropy(logits, y).mean(), logits

        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, logits = grad_fn(params)
        optimizer.update(
            model,
            grads,
            grad_fn=lambda params: grad_fn(params)[0],
            outputs=logits,
            output_fn=output_fn,
        )

    model = Linear()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(4):
        train_step(model, optimizer, x, y)
    golden = SOFTMAX["trajectories"]["previous"]
    np.testing.assert_allclose(np.ravel(model.w[...]), np.ravel(golden["w_after_4"]), rtol=1e-5)
    assert float(optimizer.opt_state[0].radius[...]) > 0
