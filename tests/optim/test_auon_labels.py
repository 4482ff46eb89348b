"""Which leaves of real parameter trees are matrices, and which of their axes are inputs."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from trustjax.models import ViT
from trustjax.optim import auon, describe_labels, matrix_labels, scale_by_auon
from trustjax.optim.auon_labels import matrix_numbers

KEY = jax.random.key(0)


def shaped(**shapes):
    """A tree of nested dicts made from "path: shape", where the path may have dots."""
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def others(params):
    """The paths with the label "other"."""
    labels = jax.tree.leaves_with_path(matrix_labels(params))
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, x in labels if x == "other"}


def matrices(params):
    """The axes of the matrices by path, as "inputs|outputs"."""
    found = jax.tree.leaves_with_path(params)
    labels, numbers = (
        jax.tree.structure(params).flatten_up_to(make(params))
        for make in (matrix_labels, matrix_numbers)
    )
    text = lambda axes: "".join(map(str, axes))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{text(n[0])}|{text(n[1])}"
        for (path, _), label, n in zip(found, labels, numbers, strict=True)
        if label == "auon"
    }


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.LayerNorm()(nn.Embed(7, 32)(tokens))
        x = nn.MultiHeadDotProductAttention(2)(x, x)
        return nn.Dense(3)(nn.DenseGeneral((2, 5))(nn.Conv(4, (3,))(x)))


def test_linen():
    """The biases of an attention have two axes, and each of its kernels is one matrix."""
    params = jax.eval_shape(_Linen().init, KEY, jnp.zeros((1, 4), int))["params"]
    attention = "MultiHeadDotProductAttention_0"
    assert matrices(params) == {
        "Conv_0/kernel": "01|2",
        "DenseGeneral_0/kernel": "0|12",
        "Dense_0/kernel": "0|1",
        **{f"{attention}/{name}/kernel": "0|12" for name in ("query", "key", "value")},
        f"{attention}/out/kernel": "01|2",
    }


def test_linen_attention_without_biases_and_in_a_scan():
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=6, use_bias=False)
    params = jax.eval_shape(attention.init, KEY, jnp.zeros((1, 4, 6)))["params"]
    assert matrices(params) == {
        "query/kernel": "0|12", "key/kernel": "0|12", "value/kernel": "0|12", "out/kernel": "01|2",
    }  # fmt: skip
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=6)
    stacked = jax.eval_shape(
        jax.vmap(attention.init, (0, None)), jax.random.split(KEY, 3), jnp.zeros((1, 4, 6))
    )["params"]
    assert matrices(stacked) == {
        "query/kernel": "1|23", "key/kernel": "1|23", "value/kernel": "1|23", "out/kernel": "12|3",
    }  # fmt: skip
    # Grouped queries: fewer heads of keys and values.
    grouped = shaped(**{
        "attn.query.kernel": (32, 4, 8), "attn.key.kernel": (32, 2, 8),
        "attn.value.kernel": (32, 2, 8), "attn.out.kernel": (4, 8, 32),
    })  # fmt: skip
    assert list(matrices(grouped).values()) == ["0|12", "01|2", "0|12", "0|12"]
    # The same names for plain matrices of three layers.
    plain = shaped(**{f"attn.{name}.kernel": (3, 8, 8) for name in ("query", "key", "out")})
    assert set(matrices(plain).values()) == {"1|2"}


def test_vit():
    params = jax.eval_shape(
        ViT(10, patch_size=4, width=8, depth=1, num_heads=2).init, KEY, jnp.zeros((1, 8, 8, 1))
    )["params"]
    names = ("query", "key", "value", "attention_out", "mlp_in", "mlp_out")
    assert matrices(params) == {f"block_0/{name}/kernel": "0|1" for name in names}


class _NNX(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.token_embed = nnx.Embed(7, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.lm_head = nnx.Linear(32, 7, rngs=rngs)


def test_nnx():
    """The attribute `value` of a variable is not a name, but the layer `value` is one."""
    state = nnx.state(nnx.eval_shape(lambda: _NNX(nnx.Rngs(0))), nnx.Param)
    for params in (state, nnx.to_pure_dict(state)):
        found = {path.removesuffix("/value"): axes for path, axes in matrices(params).items()}
        assert found == {
            "attention/query/kernel": "0|12",
            "attention/key/kernel": "0|12",
            "attention/value/kernel": "0|12",
            "attention/out/kernel": "01|2",
            "conv/kernel": "012|3",
        }


def test_equinox():
    """The outputs come first, and leaves of None are empty subtrees."""
    model = eqx.filter(
        {
            "mlp": eqx.nn.MLP(2, 3, 4, 1, key=KEY),
            "attn": eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, key=KEY),
            "conv": eqx.nn.Conv2d(3, 4, 3, key=KEY),
            "square": eqx.nn.Conv2d(4, 4, 1, key=KEY),
            "norm": eqx.nn.LayerNorm((4, 5)),
            "rest": eqx.nn.LayerNorm((4, 5)),
            "embedding": eqx.nn.Embedding(7, 3, key=KEY),
        },
        eqx.is_array,
    )
    projections = ("query_proj", "key_proj", "value_proj", "output_proj")
    assert matrices(model) == {
        **{f"attn/{name}/weight": "1|0" for name in projections},
        "conv/weight": "123|0",
        "mlp/layers/0/weight": "1|0",
        "mlp/layers/1/weight": "1|0",
        "square/weight": "123|0",
    }


def test_haiku_names():
    params = {
        "net/~/embed": {"embeddings": jnp.ones((9, 4))},
        "net/~/layer_0/multi_head_attention/query": {"w": jnp.ones((4, 8)), "b": jnp.ones(8)},
        "net/~/layer_0/multi_head_attention/linear": {"w": jnp.ones((8, 4)), "b": jnp.ones(4)},
        "net/~/layer_0/layer_norm": {"scale": jnp.ones((2, 4)), "offset": jnp.ones((2, 4))},
        "net/~/conv2_d": {"w": jnp.ones((3, 3, 4, 5)), "b": jnp.ones(5)},
        "net/~/logits": {"w": jnp.ones((4, 9)), "b": jnp.ones(9)},
        "net": {"positional_embeddings": jnp.ones((6, 4))},
    }
    assert matrices(params) == {
        "net/~/conv2_d/w": "012|3",
        "net/~/layer_0/multi_head_attention/linear/w": "0|1",
        "net/~/layer_0/multi_head_attention/query/w": "0|1",
    }


def test_gpt2_names():
    """Its layers have their inputs first, although they are called weight."""
    params = shaped(**{
        "transformer.wte.weight": (50, 8), "transformer.wpe.weight": (16, 8),
        "transformer.h.0.ln_1.weight": (8,), "transformer.h.0.ln_1.bias": (8,),
        "transformer.h.0.attn.c_attn.weight": (8, 24), "transformer.h.0.attn.c_attn.bias": (24,),
        "transformer.h.0.mlp.c_fc.weight": (8, 32), "transformer.h.0.mlp.c_fc.bias": (32,),
        "transformer.ln_f.weight": (8,), "lm_head.weight": (50, 8),
    })  # fmt: skip
    assert matrices(params) == {
        "transformer.h.0.attn.c_attn.weight": "0|1",
        "transformer.h.0.mlp.c_fc.weight": "0|1",
    }


def test_llama_names():
    layer = "model.layers.0"
    hugging_face = shaped(**{
        "model.embed_tokens.weight": (50, 8), "model.norm.weight": (8,), "lm_head.weight": (50, 8),
        f"{layer}.self_attn.q_proj.weight": (8, 8), f"{layer}.self_attn.k_proj.weight": (4, 8),
        f"{layer}.mlp.gate_proj.weight": (16, 8), f"{layer}.input_layernorm.weight": (8,),
    })  # fmt: skip
    assert matrices(hugging_face) == {
        f"{layer}.mlp.gate_proj.weight": "1|0",
        f"{layer}.self_attn.k_proj.weight": "1|0",
        f"{layer}.self_attn.q_proj.weight": "1|0",
    }
    meta = shaped(**{
        "tok_embeddings.weight": (50, 8), "output.weight": (50, 8), "norm.weight": (8,),
        "layers.0.attention.wq.weight": (8, 8), "layers.0.attention_norm.weight": (8,),
    })  # fmt: skip
    assert matrices(meta) == {"layers.0.attention.wq.weight": "1|0"}
    # All layers in one leaf: the norms have two axes.
    stacked = shaped(**{
        "layers.input_layernorm.weight": (2, 8), "layers.mlp.up_proj.kernel": (2, 8, 16),
        "layers.ffn_norm": (2, 8), "layers.mlp.b_up": (2, 16), "layers.mlp.w_up": (2, 8, 16),
    })  # fmt: skip
    assert matrices(stacked) == {"layers.mlp.up_proj.kernel": "1|2", "layers.mlp.w_up": "1|2"}


def test_keras_names():
    params = shaped(**{
        "embedding/embeddings": (9, 8), "conv2d/kernel": (3, 3, 8, 5),
        "multi_head_attention/query/kernel": (8, 2, 4), "multi_head_attention/query/bias": (2, 4),
        "multi_head_attention/attention_output/kernel": (2, 4, 8),
        "batch_normalization/gamma": (8,), "layer_normalization/beta": (2, 8),
        "dense/kernel": (8, 3), "dense/bias": (3,), "predictions/kernel": (3, 9),
    })  # fmt: skip
    assert matrices(params) == {
        "conv2d/kernel": "012|3",
        "dense/kernel": "0|1",
        "multi_head_attention/attention_output/kernel": "01|2",
        "multi_head_attention/query/kernel": "0|12",
    }


@pytest.mark.parametrize("plain", ["", "/kernel", "/w"])
def test_roles(plain):
    """They are known by the name of the leaf, or of the layer whose weight it is."""
    matrix = {
        "multi_head_attention/anything", "token_mixing", "w_q_head", "overhead", "attn_head_proj",
        "post_attention", "MultiHead_0", "output_proj", "headline", "mixer/tokens_to_channels",
        "lora_b", "layer/output/dense",
    }  # fmt: skip
    other = {
        "position_embedding", "pos_embedding", "tok_emb", "unembed", "lm_out", "classifier",
        "LMHead_0", "lm_head", "policy_head", "value_head", "head_1", "logits", "readout", "wpe",
        "cls_token", "mask_tokens", "pos", "class_token", "word_embeddings", "output_logits",
        "mlp_head", "ln_f", "ffn_norm/scale",
    }  # fmt: skip
    params = shaped(**{name + plain: (4, 5) for name in matrix | other})
    if plain == "/kernel":
        other -= {"ln_f"}  # no norm has a kernel
    assert {name.removesuffix(plain) for name in others(params)} >= other
    assert not {name.removesuffix(plain) for name in others(params)} & matrix


def test_biases():
    """They are known by their name, or by the trailing axes of the kernel beside them."""
    params = shaped(**{
        "a/kernel": (8, 2, 4), "a/bias": (2, 4), "a/shift": (2, 4), "b/w_q": (8, 2, 4),
        "b/b_q": (2, 4), "c/q_w": (8, 2, 4), "c/q_b": (2, 4), "d/lora_a": (8, 2),
        "d/lora_b": (2, 8), "ssm/B": (8, 4), "e/w1": (3, 8, 5), "e/b1": (3, 5),
        "gru/weight_hh": (12, 4), "gru/bias_n": (2, 4),
    })  # fmt: skip
    assert others(params) == {"a/bias", "a/shift", "b/b_q", "c/q_b", "e/b1", "gru/bias_n"}
    found = matrices(params)
    assert [found[x] for x in ("a/kernel", "b/w_q", "c/q_w", "e/w1")] == ["0|12"] * 3 + ["1|2"]


def test_names_that_all_leaves_share_say_nothing():
    """A network that is called a classifier has matrices; its head is known by its own name."""
    params = shaped(**{"classifier/linear/w": (3, 4), "classifier/head/w": (4, 2)})
    assert others(params) == {"classifier/head/w"}
    assert others(shaped(**{"head/kernel": (3, 4), "head/bias": (4,)})) == {
        "head/kernel",
        "head/bias",
    }


def test_leaves_that_are_no_floats():
    params = {"count": jnp.ones((2, 2), int), "none": None, "w": np.ones((2, 2), np.float32)}
    assert matrix_labels(params) == {"count": "other", "none": None, "w": "auon"}
    assert matrix_labels(jnp.ones((2, 2))) == "auon"
    assert matrix_labels({}) == {}


def test_description():
    params = shaped(
        **{"conv.kernel": (3, 3, 4, 5), "stack.kernel": (2, 3, 4), "head.kernel": (3, 4)}
    )
    lines = describe_labels(params).splitlines()
    assert [line.split()[0] for line in lines] == [
        "path", "['conv.kernel']", "['head.kernel']", "['stack.kernel']",
    ]  # fmt: skip
    assert "(3, 3, 4, 5)  auon   convolution  0, 1, 2 | 3: 36 x 5" in lines[1]
    assert lines[2].endswith("other  head")
    assert "auon   matrix       1 | 2: 2 of 3 x 4" in lines[3]


def test_auon_takes_these_matrices():
    """They come from the whole tree: the biases are hidden from the transform of the matrices."""
    params = {
        "query": {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))},
        "torch": {"weight": jnp.ones((8, 2)), "bias": jnp.ones(8)},
        "head": {"kernel": jnp.ones((3, 4))},
    }
    tx = auon(1.0, beta=0.0, shape_factor=True, other=optax.sgd(1.0))
    once = lambda tx: jax.jit(lambda p: tx.update(p, tx.init(p), p)[0])
    for step in (once(tx).__wrapped__, once(tx)):
        updates = step(params)
        np.testing.assert_allclose(updates["query"]["kernel"], -1 / 6, rtol=2e-2)
        np.testing.assert_array_equal(updates["query"]["bias"], -1)
        np.testing.assert_allclose(updates["torch"]["weight"], -2 / 4, rtol=5e-2)
        np.testing.assert_array_equal(updates["head"]["kernel"], -1)
    # What the user gives wins.
    mine = auon(
        1.0, beta=0.0, other=optax.sgd(1.0),
        label_fn=lambda p: jax.tree.map(lambda x: "auon" if x.ndim == 3 else "other", p),
        dimension_numbers=lambda p: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), p),
    )  # fmt: skip
    updates = once(mine)(params)
    expected = once(scale_by_auon(0.0))(params["query"]["kernel"])
    np.testing.assert_allclose(updates["query"]["kernel"], -expected, rtol=1e-6)
    np.testing.assert_array_equal(updates["torch"]["weight"], -1)
