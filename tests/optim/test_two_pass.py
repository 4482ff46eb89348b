"""The train step that gives every optimizer what it asks for."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SOFTMAX, array, assert_close, cross_entropies, logits, softmax_loss

from trustjax.optim import (
    alternating,
    asam,
    esam,
    fisher_sam,
    gsam,
    natural_gradient,
    sam,
    tram,
    tram_fisher,
    two_pass_step,
)

RANDOM = np.random.default_rng(0)
X, Z = RANDOM.normal(size=(2, 16, 8)).astype(np.float32)
Y = np.arange(16) % 3


def cross_entropy(outputs, y):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


# ---- batch statistics and random keys


class NoisyModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(jnp.tanh(x)))


@functools.cache
def variables():
    return jax.jit(NoisyModel().init)(
        {"params": jax.random.key(0), "dropout": jax.random.key(0)}, X
    )


def noisy_loss(params, batch_stats, key):
    outputs, new = NoisyModel().apply(
        {"params": params, "batch_stats": batch_stats},
        X,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    return cross_entropy(outputs, Y), {"outputs": outputs, **new}


def noisy_step(tx, key, loss_fn=noisy_loss):
    params, batch_stats = variables()["params"], variables()["batch_stats"]
    step = jax.jit(two_pass_step(loss_fn, tx))
    return step(params, tx.init(params), batch_stats, key)


def difference(actual, expected):
    gap = lambda a, e: np.abs(np.asarray(a) - np.asarray(e)).max()
    return max(jax.tree.leaves(jax.tree.map(gap, actual, expected)))


def test_one_key_for_both_passes():
    """At radius 0 both gradients agree, dropout included, up to how XLA fuses each pass."""
    key, other_key = jax.random.split(jax.random.key(1))
    plain = noisy_step(optax.sgd(1.0), key)
    both = noisy_step(optax.chain(sam(0.0), optax.sgd(1.0)), key)
    assert difference(both.params, plain.params) < 1e-6
    assert both.loss == plain.loss
    assert difference(noisy_step(optax.sgd(1.0), other_key).params, plain.params) > 1e-3


def test_batch_statistics_come_from_the_first_pass():
    key = jax.random.key(1)
    params, batch_stats = variables()["params"], variables()["batch_stats"]
    result = noisy_step(optax.chain(sam(10.0), optax.sgd(0.1)), key)
    loss_fn = jax.jit(jax.value_and_grad(noisy_loss, has_aux=True))
    (_, expected), gradient = loss_fn(params, batch_stats, key)
    assert difference(result.aux, expected) < 1e-6
    # Those of the attacked weights are far off.
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    attacked = jax.tree.map(lambda p, g: p + np.float32(10.0) * g / length, params, gradient)
    (_, wrong), _ = loss_fn(attacked, batch_stats, key)
    assert difference(wrong["batch_stats"], expected["batch_stats"]) > 0.1


# ---- what optimizers get


def linear_loss(w, x, y):
    outputs = x @ w
    return cross_entropy(outputs, y), {"outputs": outputs}


def softmax_steps(loss_fn, tx, steps, *, donate=(0, 1), **functions):
    w = array(SOFTMAX["w"])
    step = jax.jit(two_pass_step(loss_fn, tx, **functions), donate_argnums=donate)
    params, state, losses = w, tx.init(w), []
    for _ in range(steps):
        params, state, loss, aux = step(params, state)
        losses.append(float(loss))
    return params, state, losses, aux


@pytest.mark.parametrize("with_aux", [False, True])
def test_sam_golden(with_aux, precision):
    """Buffers are donated, with and without auxiliary outputs; the loss is the clean one."""
    loss_fn = (lambda w: (softmax_loss(w), {"seen": w})) if with_aux else softmax_loss
    tx = optax.chain(sam(0.05), optax.sgd(SOFTMAX["learning_rate"]))
    params, _, losses, aux = softmax_steps(loss_fn, tx, 1)
    assert_close(params, SOFTMAX["steps"]["sam"]["new_w"])
    assert_close(losses[0], SOFTMAX["loss"])
    if with_aux:
        assert_close(aux["seen"], SOFTMAX["w"])
    else:
        assert aux is None


@pytest.mark.parametrize("with_outputs", [False, True])
@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_tram_golden(reference, with_outputs, x64):
    golden = SOFTMAX["trajectories"][reference]
    aux = lambda w: {"outputs": logits(w)} if with_outputs else {}
    tx = optax.chain(tram(reference), optax.sgd(SOFTMAX["learning_rate"]))
    params, state, _, _ = softmax_steps(
        lambda w: (softmax_loss(w), aux(w)), tx, 4, output_fn=logits
    )
    assert_close(params, golden["w_after_4"])
    assert_close(optax.tree.get(state, "radius"), golden["radius"][-1])


def test_noise_golden(x64):
    noise, learning_rate = SOFTMAX["noise"], SOFTMAX["learning_rate"]
    loss_fn = lambda w: (softmax_loss(w), {"outputs": logits(w)})
    params, state, _, _ = softmax_steps(
        loss_fn,
        optax.chain(tram("noise"), optax.sgd(learning_rate)),
        1,
        noisy_output_fn=lambda w: logits(w, noise["z"]),
    )
    assert_close(params, noise["new_w"])
    assert_close(optax.tree.get(state, "radius"), noise["kl"])
    params, _, _, _ = softmax_steps(
        loss_fn,
        optax.chain(tram_fisher(0.1, 0.1), optax.sgd(learning_rate)),
        1,
        noisy_loss_fn=lambda w: softmax_loss(w, noise["z"]),
    )
    assert_close(params, SOFTMAX["fisher"]["batch_mean"]["new_w"])


def test_mask_of_examples_reaches_tram():
    where = np.array([True, False, True])
    loss_fn = lambda w: (softmax_loss(w), {"outputs": logits(w), "where": where})
    tx, reference, w = tram("initial"), array(SOFTMAX["reference"]), array(SOFTMAX["w"])
    step = jax.jit(two_pass_step(loss_fn, optax.chain(tx, optax.sgd(0.1)), output_fn=logits))
    state = step(w, (tx.init(reference), (optax.EmptyState(), optax.EmptyState()))).opt_state
    expected = np.array(SOFTMAX["kl_per_example"])[where].mean()
    np.testing.assert_allclose(optax.tree.get(state, "radius"), expected, rtol=1e-5)


@pytest.mark.parametrize("make", [lambda: optax.adamw(0.05), optax.lbfgs], ids=["adamw", "lbfgs"])
def test_plain_optimizers(make):
    """The line search of lbfgs asks for value, grad and value_fn, and refuses unknown arguments."""
    functions = {"output_fn": logits, "noisy_output_fn": logits, "noisy_loss_fn": softmax_loss}
    aux = lambda w: {
        "outputs": logits(w),
        "where": jnp.ones(3, bool),
        "losses": cross_entropies(w),
    }
    loss_fn = lambda w: (softmax_loss(w), aux(w))
    # The fresh state of lbfgs holds one buffer twice, so it cannot be donated.
    _, _, losses, _ = softmax_steps(loss_fn, make(), 4, donate=(), **functions)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


def test_further_arguments_go_to_every_function(x64):
    """The further argument here is a shift of the inputs."""
    w, shift = array(SOFTMAX["w"]), np.array(SOFTMAX["noise"]["z"])
    first = np.array([True, False, False])
    arrays = ("value", "grad", "losses", "noisy_outputs", "fisher_grads")

    def loss_fn(w, shift):
        return softmax_loss(w, shift), {"losses": cross_entropies(w, shift)}

    def report(updates, state, params, **given):
        functions = ("grad_fn", "value_fn", "output_fn", "losses_fn")
        results = {name: given[name](params) for name in functions}
        results["selected"] = given["grad_fn"](params, where=first)
        return updates, results | {name: given[name] for name in arrays}

    step = two_pass_step(
        loss_fn,
        optax.GradientTransformationExtraArgs(lambda _: (), report),
        output_fn=logits,
        noisy_output_fn=logits,
        noisy_loss_fn=softmax_loss,
    )
    given = jax.jit(lambda w: step(w, (), shift).opt_state)(w)
    value, gradient = jax.jit(lambda w: jax.value_and_grad(softmax_loss)(w, shift))(w)
    outputs, losses = logits(w, shift), cross_entropies(w, shift)
    expected = {
        "losses": losses,
        "losses_fn": losses,
        "selected": jax.grad(lambda w: cross_entropies(w, shift)[0])(w),
        "value": value,
        "value_fn": value,
        "grad": gradient,
        "grad_fn": gradient,
        "fisher_grads": gradient,
        "output_fn": outputs,
        "noisy_outputs": outputs,
    }
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-11), given, expected)


def test_gradients_of_all_passes_are_mapped(x64):
    """The function sees the gradients of both passes, but no value and no loss."""
    w = array(SOFTMAX["w"])

    def report(updates, state, params, *, grad, grad_fn, value, fisher_grads, losses_fn, **_):
        found = {"updates": updates, "grad": grad, "fisher_grads": fisher_grads}
        selected = grad_fn(params, where=np.array([True, False, False]))
        found |= {"grad_fn": grad_fn(params), "selected": selected}
        return updates, {"mapped": found, "same": (value, losses_fn(params))}

    def given(**options):
        step = two_pass_step(
            lambda w: (softmax_loss(w), {"losses": cross_entropies(w)}),
            optax.GradientTransformationExtraArgs(lambda _: (), report),
            noisy_loss_fn=softmax_loss,
            **options,
        )
        return jax.jit(step)(w, ())

    plain, tripled = given(), given(map_grads=lambda grads: jax.tree.map(lambda x: 3 * x, grads))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    jax.tree.map(
        lambda found, expected: close(found, 3 * expected),
        tripled.opt_state["mapped"],
        plain.opt_state["mapped"],
    )
    jax.tree.map(close, tripled.opt_state["same"], plain.opt_state["same"])
    close(tripled.loss, plain.loss)
    close(tripled.params - w, 3 * (plain.params - w))


# ---- through the wrappers of Optax


def attacked_sgd():
    return optax.chain(sam(0.05), optax.sgd(SOFTMAX["learning_rate"]))


def always(step):
    return step >= 0


# Those through which a step is that of the bare chain; the table of docs/methods/sam.md.
TRANSPARENT = {
    "chain": lambda: optax.chain(attacked_sgd()),
    "named_chain": lambda: optax.named_chain(("attack", sam(0.05)), ("base", optax.sgd(0.1))),
    "apply_if_finite": lambda: optax.apply_if_finite(attacked_sgd(), 3),
    "conditionally_transform": lambda: optax.conditionally_transform(attacked_sgd(), always),
    "conditionally_mask": lambda: optax.conditionally_mask(attacked_sgd(), always),
    "inject_hyperparams": lambda: optax.chain(
        optax.inject_hyperparams(sam)(rho=0.05), optax.sgd(0.1)
    ),
    "inject_hyperparams_of_a_chain": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(sam(0.05), optax.sgd(rate))
    )(rate=0.1),
    "partition_behind": lambda: optax.chain(
        sam(0.05), optax.partition({"all": optax.sgd(0.1)}, "all")
    ),
    "reduce_on_plateau": lambda: optax.chain(
        attacked_sgd(), optax.contrib.reduce_on_plateau(patience=3)
    ),
    "multi_steps_of_one": lambda: optax.MultiSteps(attacked_sgd(), 1),
    "multi_steps_as_a_transform": lambda: optax.MultiSteps(
        attacked_sgd(), 1
    ).gradient_transformation(),
    "multi_steps_that_skip": lambda: optax.MultiSteps(
        attacked_sgd(), 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "multi_steps_in_a_chain": lambda: optax.chain(
        optax.clip(1e3), all_arguments(optax.MultiSteps(attacked_sgd(), 1))
    ),
    "multi_steps_behind": lambda: optax.chain(
        sam(0.05), optax.MultiSteps(optax.sgd(0.1), 1).gradient_transformation()
    ),
}


def all_arguments(wrapped):
    return optax.GradientTransformationExtraArgs(wrapped.init, wrapped.update)


@pytest.mark.table
@pytest.mark.parametrize("name", TRANSPARENT)
def test_wrappers_pass_arguments_on(name):
    params, *_ = softmax_steps(softmax_loss, TRANSPARENT[name](), 1, donate=())
    np.testing.assert_allclose(np.ravel(params), SOFTMAX["steps"]["sam"]["new_w"], rtol=1e-5)


def test_accumulation_around_the_attack():
    """Two calls make one step with their mean gradient, whose attack is made in the second call."""
    tx = optax.MultiSteps(attacked_sgd(), 2)
    w, state = array(SOFTMAX["w"]), tx.init(array(SOFTMAX["w"]))
    loss_fn = lambda w, shift: softmax_loss(w) + shift * jnp.sum(jnp.sin(w))
    step = jax.jit(two_pass_step(loss_fn, tx))
    held, state, _, _ = step(w, state, 0.0)
    np.testing.assert_array_equal(held, w)
    actual, _, _, _ = step(held, state, 0.3)
    mean = (jax.grad(loss_fn)(w, 0.0) + jax.grad(loss_fn)(w, 0.3)) / 2
    attacked = w + 0.05 * mean / jnp.linalg.norm(mean)
    np.testing.assert_allclose(actual, w - 0.1 * jax.grad(loss_fn)(attacked, 0.3), rtol=1e-5)


# Those that pass no arguments on, by the name that the error gives.
DROPPING = {
    "MultiSteps": lambda tx: optax.chain(
        optax.clip(1.0), optax.MultiSteps(tx, 2).gradient_transformation()
    ),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
}


@pytest.mark.parametrize("wrapper", DROPPING)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("make", "needs"),
    [
        (attacked_sgd, ("sam", "grad_fn")),
        (lambda: natural_gradient(0.01), ("natural_gradient", "loss_fn and divergence_fn")),
    ],
    ids=["sam", "natural_gradient"],
)
def test_the_wrapper_that_drops_arguments_is_named(wrapper, wrap, make, needs):
    w, tx = array(SOFTMAX["w"]), DROPPING[wrapper](make())
    name, arguments = needs
    words = f"{name} needs {arguments}.* two_pass_step passed {arguments}, but .* to {wrapper} only"
    with pytest.raises(ValueError, match=words):
        wrap(two_pass_step(softmax_loss, tx, output_fn=logits))(w, tx.init(w))


@pytest.mark.parametrize(
    "make",
    [attacked_sgd, lambda: optax.chain(tram(), optax.sgd(0.1)), lambda: natural_gradient(0.01)],
    ids=["sam", "tram", "natural_gradient"],
)
@pytest.mark.parametrize("around", [lambda tx: tx, optax.chain], ids=["bare", "chain"])
def test_the_wrapper_that_reshapes_parameters_is_named(make, around):
    """`optax.flatten` passes on one vector, which a function of the parameters does not take."""
    params = {"w": array(SOFTMAX["w"])}
    tx = around(optax.flatten(make()))
    step = two_pass_step(lambda p: softmax_loss(p["w"]), tx, output_fn=lambda p: logits(p["w"]))
    with pytest.raises(ValueError, match=r"flatten .* float32\[4\].*around the base optimizer"):
        step(params, tx.init(params))


def test_lookahead_is_refused():
    """The parameters of optax.lookahead are pairs."""
    pairs = optax.LookaheadParams.init_synced(array(SOFTMAX["w"]))
    tx = optax.lookahead(attacked_sgd(), 2, 0.5)
    with pytest.raises(ValueError, match=r"params is an optax\.LookaheadParams"):
        two_pass_step(softmax_loss, tx)(pairs, tx.init(pairs))


def test_schedule_free_attacks_at_its_own_parameters():
    tx = optax.contrib.schedule_free(attacked_sgd(), 0.1)
    w = array(SOFTMAX["w"])
    state = tx.init(w)
    step = jax.jit(two_pass_step(softmax_loss, tx))
    inner, inner_state = attacked_sgd(), attacked_sgd().init(w)
    base = optax.contrib.schedule_free(optax.identity(), 0.1)
    base_state = base.init(w)
    for _ in range(2):
        y = w
        w, state, *_ = step(w, state)
        gradient = jax.grad(softmax_loss)
        move, inner_state = inner.update(gradient(y), inner_state, y, grad_fn=gradient)
        updates, base_state = base.update(move, base_state, y)
        np.testing.assert_allclose(w, y + updates, rtol=1e-5)


def test_arguments_without_a_source_are_named_alone():
    w, tx = array(SOFTMAX["w"]), optax.chain(tram(), optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs outputs and output_fn") as error:
        two_pass_step(softmax_loss, tx)(w, tx.init(w))
    assert "two_pass_step passed" not in str(error.value)


def test_a_transform_gets_the_keywords_it_names():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: -value * g, updates), state

    plain = optax.GradientTransformation(lambda _: (), update)
    w = array(SOFTMAX["w"])
    params = two_pass_step(softmax_loss, plain)(w, ()).params
    np.testing.assert_allclose(params, w - SOFTMAX["loss"] * jax.grad(softmax_loss)(w), rtol=1e-5)


# ---- the attack comes first


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(optax.adamw(1e-3), sam(0.05)),
        lambda: optax.chain(optax.clip(1.0), optax.sgd(0.1), tram()),
        lambda: optax.chain(optax.chain(optax.adamw(1e-3), asam(0.05))),
        lambda: optax.apply_if_finite(optax.chain(optax.adamw(1e-3), gsam(0.05)), 3),
        lambda: optax.MultiSteps(optax.chain(optax.adamw(1e-3), fisher_sam(0.05)), 2),
        lambda: optax.chain(optax.sgd(0.1), optax.inject_hyperparams(sam)(rho=0.05)),
        lambda: sam(0.05),
    ],
    ids=["chain", "tram", "nested", "apply_if_finite", "multi_steps", "inject", "alone"],
)
def test_an_attack_at_the_end_is_refused(make):
    """The gradient of the attack would be added to the weights as it is."""
    w, tx = array(SOFTMAX["w"]), make()
    with pytest.raises(ValueError, match="the last transform of tx is an attack"):
        jax.jit(two_pass_step(softmax_loss, tx))(w, tx.init(w))


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(optax.clip_by_global_norm(1.0), sam(0.05), optax.sgd(0.1)),
        lambda: optax.chain(optax.chain(optax.zero_nans(), sam(0.05)), optax.scale(-0.1)),
        lambda: alternating(sam(0.05), optax.sgd(0.1)),
        # A step that the user's own wrapper makes of the gradient.
        lambda: optax.GradientTransformationExtraArgs(
            sam().init,
            lambda *args, **extra_args: (
                lambda gradient, state: (jax.tree.map(lambda g: -0.1 * g, gradient), state)
            )(*sam().update(*args, **extra_args)),
        ),
    ],
    ids=["clip", "nested", "alternating", "own"],
)
def test_other_places_are_not(make):
    w, tx = array(SOFTMAX["w"]), make()
    step = two_pass_step(softmax_loss, tx)
    jax.eval_shape(step, w, tx.init(w))


# ---- natural gradient


@pytest.mark.parametrize("source", ["output_fn", "outputs"])
def test_natural_gradient_has_its_functions(source):
    """The divergence is the mean KL from the outputs at the old parameters."""
    radius = 0.01
    tx = natural_gradient(radius)
    loss_fn = lambda w: (softmax_loss(w), {"outputs": logits(w)} if source == "outputs" else {})
    functions = {"output_fn": logits} if source == "output_fn" else {}
    w = array(SOFTMAX["w"])
    step = jax.jit(two_pass_step(loss_fn, tx, **functions))
    new, state, loss, _ = step(w, tx.init(w))
    assert state.accepted
    old, now = jax.nn.log_softmax(logits(w)), jax.nn.log_softmax(logits(new))
    moved = np.mean(np.sum(np.exp(old) * (old - now), -1))
    np.testing.assert_allclose(state.distance, moved, rtol=1e-3)
    assert 0.5 * radius < moved <= 1.01 * radius
    assert softmax_loss(new) < loss
    # Another divergence is another step.
    other, *_ = jax.jit(two_pass_step(loss_fn, tx, divergence="l2", **functions))(w, tx.init(w))
    assert np.abs(other - new).max() > 1e-3


def test_unknown_divergence():
    with pytest.raises(ValueError, match=r"divergence must be one of 'kl', .*, got 'KL'"):
        two_pass_step(softmax_loss, optax.sgd(0.1), divergence="KL")


# ---- what it costs


def mlp(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


# A forward pass of the two layers has 2 matrix products, a backward pass 3.
FORWARD, BACKWARD = 2, 3


@pytest.mark.table
@pytest.mark.parametrize(
    ("make", "products"),
    [
        (lambda: optax.adamw(1e-3), FORWARD + BACKWARD),
        (lambda: optax.chain(sam(), optax.adamw(1e-3)), 2 * FORWARD + 2 * BACKWARD),
        (lambda: optax.chain(tram(), optax.adamw(1e-3)), 3 * FORWARD + 2 * BACKWARD),
        (lambda: optax.chain(tram("noise"), optax.adamw(1e-3)), 3 * FORWARD + 2 * BACKWARD),
        (lambda: optax.chain(tram_fisher(), optax.adamw(1e-3)), 3 * FORWARD + 3 * BACKWARD),
        (lambda: optax.chain(fisher_sam(), optax.adamw(1e-3)), 2 * FORWARD + 2 * BACKWARD),
        (lambda: optax.chain(gsam(), optax.adamw(1e-3)), 2 * FORWARD + 2 * BACKWARD),
        (lambda: optax.chain(esam(), optax.adamw(1e-3)), 2 * FORWARD + 2 * BACKWARD),
    ],
    ids=["adamw", "sam", "tram", "tram_noise", "tram_fisher", "fisher_sam", "gsam", "esam"],
)
def test_unused_passes_are_not_computed(make, products):
    """The compiled step of an optimizer contains only the passes that it needs."""

    def loss_fn(params, x, z):
        outputs = mlp(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, Y)
        return losses.mean(), {"outputs": outputs, "losses": losses}

    step = two_pass_step(
        loss_fn,
        make(),
        output_fn=lambda params, x, z: mlp(params, x),
        noisy_output_fn=lambda params, x, z: mlp(params, x + z),
        noisy_loss_fn=lambda params, x, z: cross_entropy(mlp(params, x + z), Y),
    )
    params = [jnp.ones((8, 8)), jnp.ones((8, 3))]
    compiled = jax.jit(step).lower(params, make().init(params), X, Z).compile()
    assert len(re.findall(r" dot\(", compiled.as_text())) == products
