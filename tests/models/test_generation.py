"""Sampling: what transformers takes greedily and keeps by its filters, and fresh forward passes.

tests/golden/make_generation.py made the numbers with transformers.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trustjax.losses import token_log_probs
from trustjax.models import Decoder, generate, pretrained_transformer
from trustjax.models.generation import _sampled

GOLDEN = Path(__file__).parents[1] / "golden"
NUMBERS = json.loads((GOLDEN / "generation.json").read_text(encoding="utf-8"))
KEY = jax.random.key(0)
PROMPTS = jnp.array([[3, 17, 5, 11, 29], [0, 0, 7, 14, 13], [8, 9, 1, 0, 0]])
MASK = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
MODEL = Decoder(vocab_size=40, width=16, depth=2, num_heads=4, num_kv_heads=2, mlp_width=24)


@pytest.fixture(scope="module")
def params() -> Any:
    """Weights whose distributions are neither flat nor sure; rounding grows with their scale."""
    variables = jax.jit(MODEL.init)(KEY, PROMPTS)
    return jax.tree.map(lambda leaf: 4 * leaf, variables["params"])


@pytest.mark.table
@pytest.mark.parametrize("name", NUMBERS["greedy"])
def test_greedy_equals_transformers(name: str) -> None:
    """Token by token, for prompts padded on the left; transformers ran each by itself."""
    model = pretrained_transformer(GOLDEN / "text" / name)
    prompts = jnp.array([[3, 17, 5, 11, 29], [0, 0, 7, 14, 13]])
    found = generate(
        model, model.load_pretrained(), prompts, KEY,
        max_new_tokens=12, prompt_mask=prompts > 0, temperature=0.0,
    )  # fmt: skip
    assert found.tokens.tolist() == NUMBERS["greedy"][name]


@pytest.mark.table
@pytest.mark.parametrize("case", NUMBERS["filters"], ids=lambda case: "-".join(case["options"]))
def test_filters_keep_what_transformers_keeps(case: dict[str, Any]) -> None:
    """The frequencies of 40,000 samples of each row are the probabilities of transformers."""
    count = 40_000
    expected = np.array(case["probs"])
    options = {"top_k": None, "top_p": None, "min_p": None, **case["options"]}
    logits = jnp.array(NUMBERS["logits"])
    keys = jax.random.split(KEY, 3 * count)
    draw: Callable[..., Any] = jax.jit(lambda keys, z: _sampled(keys, z, **options))
    tokens, log_probs = draw(keys, jnp.repeat(logits, count, 0))
    frequencies = np.stack([np.bincount(row, minlength=30) for row in tokens.reshape(3, count)])
    assert np.all((frequencies > 0) <= (expected > 0))
    np.testing.assert_allclose(frequencies / count, expected, atol=5 * np.sqrt(0.25 / count))
    whole = jax.nn.log_softmax(logits / options["temperature"])
    wanted = jnp.repeat(whole, count, 0)[jnp.arange(3 * count), tokens]
    np.testing.assert_allclose(log_probs, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probs_are_those_of_a_fresh_pass(params: Any, temperature: float) -> None:
    """And those that a loss computes; padding on the left or right changes nothing."""
    found = generate(
        MODEL, params, PROMPTS, KEY, max_new_tokens=9, prompt_mask=MASK, num_samples=2,
        temperature=temperature, top_k=20, stop_tokens=(2, 4, 6, 8), pad_token=0,
    )  # fmt: skip
    prompts, given = jnp.repeat(PROMPTS, 2, 0), jnp.repeat(MASK, 2, 0) > 0
    whole = jnp.concatenate([prompts, found.tokens], 1)
    included = jnp.concatenate([given, found.mask], 1)
    order = jnp.argsort(~included, axis=1, stable=True)  # all tokens of a row, then the padding
    whole, included = (jnp.take_along_axis(x, order, 1) for x in (whole, included))

    @jax.jit
    def fresh(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params}
        hidden = MODEL.apply(variables, tokens, method="hidden")
        log_probs = token_log_probs(
            hidden[:, :-1] / (temperature or 1), MODEL.head_matrix(params), tokens[:, 1:]
        )
        return log_probs, jnp.argmax(MODEL.apply(variables, hidden, method="logits"), -1)

    log_probs, likeliest = map(np.asarray, fresh(whole))
    found = jax.tree.map(np.asarray, found)
    numbers = np.asarray(given).sum(1)
    for row, (number, length) in enumerate(zip(numbers, found.mask.sum(1), strict=True)):
        drawn = found.log_probs[row, :length]
        expected = log_probs[row, number - 1 : number - 1 + length]
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-5)
        if temperature == 0:
            answer = likeliest[row, number - 1 : number - 1 + length]
            np.testing.assert_array_equal(found.tokens[row, :length], answer)


def test_an_answer_ends_with_a_stop_token(params: Any) -> None:
    stops = tuple(range(0, 40, 4))
    found = generate(
        MODEL, params, PROMPTS, KEY,
        max_new_tokens=30, prompt_mask=MASK, num_samples=4, stop_tokens=stops, pad_token=39,
    )  # fmt: skip
    assert found.tokens.shape == (12, 30)
    for tokens, mask, log_probs, stopped in zip(*map(np.asarray, found), strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert stopped
        assert int(tokens[length - 1]) in stops
        assert not np.isin(tokens[: length - 1], stops).any()
        assert (tokens[length:] == 39).all()
        assert (log_probs[length:] == 0).all()
    unstopped = generate(MODEL, params, PROMPTS, KEY, max_new_tokens=3, prompt_mask=MASK)
    assert unstopped.mask.all()
    assert not unstopped.stopped.any()


@pytest.mark.slow
def test_it_ends_when_all_have_stopped(params: Any) -> None:
    """No step of the loop is taken if every first token stops; it would call the model."""
    calls: list[int] = []

    class Counted(Decoder):
        def hidden(self, *args: Any, **kwargs: Any) -> Any:
            jax.debug.callback(lambda: calls.append(1))
            return super().hidden(*args, **kwargs)

    fields = {name: getattr(MODEL, name) for name in ("vocab_size", "width", "depth", "num_heads")}
    model = Counted(**fields, num_kv_heads=2, mlp_width=24)
    options: dict[str, Any] = {"max_new_tokens": 20, "prompt_mask": MASK}
    generate(model, params, PROMPTS, KEY, stop_tokens=tuple(range(40)), **options)
    jax.effects_barrier()
    assert len(calls) == 1
    generate(model, params, PROMPTS, KEY, **options)
    jax.effects_barrier()
    assert len(calls) == 1 + 20


def test_a_row_is_what_it_is_alone(params: Any) -> None:
    """Samples that share a prefill equal those of the repeated prompt."""
    shared = generate(
        MODEL, params, PROMPTS, KEY, max_new_tokens=6, prompt_mask=MASK, num_samples=2
    )
    repeated = generate(
        MODEL, params, jnp.repeat(PROMPTS, 2, 0), KEY,
        max_new_tokens=6, prompt_mask=jnp.repeat(MASK, 2, 0),
    )  # fmt: skip
    np.testing.assert_array_equal(shared.tokens, repeated.tokens)
    assert not np.array_equal(shared.tokens[0], shared.tokens[1])


def test_eight_devices_equal_one(params: Any) -> None:
    prompts = jnp.tile(PROMPTS, (8, 1))[:16]
    mask = jnp.tile(MASK, (8, 1))[:16]
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    rows = NamedSharding(mesh, P("data"))
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_tokens": (2, 3, 4)}
    one = generate(MODEL, params, prompts, KEY, prompt_mask=mask, **options)
    split = generate(
        MODEL,
        jax.device_put(params, NamedSharding(mesh, P())),
        jax.device_put(prompts, rows),
        KEY,
        prompt_mask=jax.device_put(mask, rows),
        **options,
    )
    np.testing.assert_array_equal(split.tokens, one.tokens)
    np.testing.assert_allclose(split.log_probs, one.log_probs, atol=1e-5)
    assert len(split.tokens.sharding.device_set) == 8


def test_explicit_axes_of_a_mesh_are_refused(params: Any) -> None:
    """As Flax's embeddings cannot be split over them; those of `make_mesh` of this package can."""
    mesh = jax.make_mesh((8,), ("data",), devices=jax.devices()[:8])
    prompts = jax.device_put(jnp.tile(PROMPTS, (8, 1))[:16], NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="prompts must be split over a mesh with automatic axes"):
        generate(MODEL, params, prompts, KEY, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"make it by trustjax\.parallel\.make_mesh"):
        MODEL.apply({"params": params}, prompts)


def test_lanes_of_vmap_end_together_and_keep_their_answers(params: Any) -> None:
    """Each lane has the answers it has alone, and no lane is chosen anew at every token."""
    lanes = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)

    def answers(params: Any) -> Any:
        # Greedy answers to one prompt: the two lanes stop at different tokens.
        return generate(
            MODEL, params, PROMPTS[:1], KEY, max_new_tokens=8, temperature=0.0,
            stop_tokens=(17,),
        )  # fmt: skip

    program = jax.jit(jax.vmap(answers))
    found = program(lanes)
    one = jax.jit(answers)
    for lane in range(2):
        alone = one(jax.tree.map(lambda x: x[lane], lanes))  # noqa: B023
        np.testing.assert_array_equal(found.tokens[lane], alone.tokens)
        np.testing.assert_array_equal(found.mask[lane], alone.mask)
        np.testing.assert_array_equal(found.stopped[lane], alone.stopped)
        np.testing.assert_allclose(found.log_probs[lane], alone.log_probs, atol=1e-5)
    lengths = found.mask.sum(-1).ravel()
    assert lengths[0] != lengths[1]
    # A condition that differed between lanes would make each lane choose its old or new caches.
    text = program.lower(lanes).as_text()
    assert not re.search(r"stablehlo.select .*tensor<2x1x2x(13x4|4x13)xf32>", text)


@pytest.mark.slow
def test_numbers_may_be_traced(params: Any) -> None:
    def drawn(temperature: jax.Array) -> jax.Array:
        return generate(
            MODEL, params, PROMPTS, KEY, max_new_tokens=3, temperature=temperature, min_p=0.1
        ).tokens

    found = jax.vmap(drawn)(jnp.array([0.0, 1.0, 3.0]))
    np.testing.assert_array_equal(found[0], drawn(jnp.array(0.0)))
    assert len(np.unique(np.asarray(found), axis=0)) > 1


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"prompts": PROMPTS[0]},
            r"prompts must be integers \[batch, time\], got shape \(5,\) of int32",
        ),
        ({"prompts": PROMPTS / 2}, "prompts must be integers"),
        ({"prompt_mask": MASK[:1]}, "prompt_mask must have the shape of prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"num_samples": 0}, "num_samples must be >= 1"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"top_k": 0}, "top_k must be >= 1"),
        ({"top_p": 0.0}, "top_p must be > 0"),
        ({"top_p": 1.5}, "top_p must be <= 1"),
        ({"min_p": -0.1}, "min_p must be >= 0"),
        ({"model": MODEL.clone(positions="learned", max_length=7)}, "max_new_tokens must be <= 2"),
    ],
)
def test_errors(params: Any, changed: dict[str, Any], text: str) -> None:
    given = {"model": MODEL, "prompts": PROMPTS, "max_new_tokens": 3, **changed}
    with pytest.raises(ValueError, match=text):
        generate(params=params, key=KEY, **given)
