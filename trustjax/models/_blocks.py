"""The blocks of transformers for text, and checks of what goes into them."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_choice, check_count, check_number
from trustjax.models._rotary import rotate

Rotary = tuple[jax.Array, jax.Array]  # cosines and sines

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}
INIT = nn.initializers.normal(0.02)


def _rows_times_matrix(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: jax.lax.DotDimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """The product [..., features] of [..., width] and [width, features], as a dense layer asks it.

    All leading axes become one: with two of them, XLA on CPU takes twice as long for the gradient.
    """
    del dimension_numbers  # a dense layer contracts the last axis with the first
    rows = lhs.reshape(-1, lhs.shape[-1])
    product = partial(jax.lax.dot, precision=precision)
    out = product(rows, rhs, preferred_element_type=preferred_element_type)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


@dataclass(frozen=True)
class Sizes:
    """What a block needs to know; the fields are those of `Decoder` and `Encoder`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm: str
    norm_epsilon: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    gated: bool
    activation: str
    dropout: float
    causal: bool
    dtype: DTypeLike

    def dense(self, features: int, bias: bool, name: str) -> nn.Dense:
        """A dense layer."""
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=INIT,
            dot_general=_rows_times_matrix,
            name=name,
        )

    def normalize(self, name: str) -> nn.RMSNorm | nn.LayerNorm:
        """A norm over the last axis, with statistics in float32."""
        kind = nn.RMSNorm if self.norm == "rms" else nn.LayerNorm
        # The fast variance E x^2 - (E x)^2 loses digits where one feature is far above the rest.
        return kind(self.norm_epsilon, dtype=self.dtype, use_fast_variance=False, name=name)


class _Attention(nn.Module):
    """Attention with grouped queries: Ainslie et al. 2023, arXiv:2305.13245."""

    sizes: Sizes

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotary: Rotary | None,
        mask: jax.Array | None,
        cache: tuple[jax.Array, jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        sizes = self.sizes
        batch, length, width = x.shape

        def heads(name: str, number: int) -> jax.Array:
            dense = sizes.dense(number * sizes.head_dim, sizes.qkv_bias, name)
            return dense(x).reshape(batch, length, number, sizes.head_dim)

        query = heads("query", sizes.num_heads)
        key, value = (heads(name, sizes.num_kv_heads) for name in ("key", "value"))
        if sizes.qk_norm:
            query, key = sizes.normalize("query_norm")(query), sizes.normalize("key_norm")(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is None:
            x = jax.nn.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                is_causal=sizes.causal and mask is None,  # a mask has the causal one in it
            )
        else:
            assert mask is not None  # `_attended` makes one for every cache
            keys, values, filled = cache
            write = jax.lax.dynamic_update_slice_in_dim
            key = write(keys, key.transpose(0, 2, 3, 1).astype(keys.dtype), filled, axis=3)
            value = write(values, value.transpose(0, 2, 1, 3).astype(values.dtype), filled, axis=2)
            x = _cached_attention(query, key, value, mask)
        x = x.reshape(batch, length, -1)
        return sizes.dense(width, sizes.out_bias, "out")(x), (key, value)


def _cached_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    """Attention [batch, time, heads, head_dim] of queries to the keys and values of a `KVCache`.

    `jax.nn.dot_product_attention` would transpose the whole cache at every token. The products are
    written as `dot_general` with the small operand first, because einsum exchanges the operands,
    and XLA on CPU then takes seven times as long for one token.
    """
    batch, time, heads, dim = query.shape
    kv_heads, columns = values.shape[1:3]
    product = partial(jax.lax.dot_general, dimension_numbers=(((3,), (2,)), ((0, 1), (0, 1))))
    # The queries of all heads that share keys and values, [batch, kv_heads, group * time, dim].
    grouped = query.reshape(batch, time, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, -1, dim)
    scores = product(grouped, keys.astype(query.dtype), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, -1, time, columns) * dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -jnp.inf), -1)
    weights = weights.astype(query.dtype).reshape(batch, kv_heads, -1, columns)
    attended = product(weights, values.astype(query.dtype))
    attended = attended.reshape(batch, kv_heads, -1, time, dim)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, dim)


class _MLP(nn.Module):
    """Two layers; with a gate SwiGLU: Shazeer 2020, arXiv:2002.05202."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sizes = self.sizes
        activate = ACTIVATIONS[sizes.activation]
        hidden = sizes.dense(sizes.mlp_width, sizes.mlp_bias, "in")(x)
        if sizes.gated:
            hidden = activate(sizes.dense(sizes.mlp_width, sizes.mlp_bias, "gate")(x)) * hidden
        else:
            hidden = activate(hidden)
        return sizes.dense(x.shape[-1], sizes.mlp_bias, "out")(hidden)


class Block(nn.Module):
    """A transformer block: the norms come before attention and MLP, or after the sums."""

    sizes: Sizes
    post_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotary: Rotary | None,
        mask: jax.Array | None,
        cache: tuple[jax.Array, jax.Array, jax.Array] | None,
        train: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        attention, mlp = _Attention(self.sizes, name="attention"), _MLP(self.sizes, name="mlp")
        norms = self.sizes.normalize("attention_norm"), self.sizes.normalize("mlp_norm")
        drop = nn.Dropout(self.sizes.dropout, deterministic=not train)
        if self.post_norm:
            y, stored = attention(x, rotary, mask, cache)
            x = norms[0](x + drop(y))
            return norms[1](x + drop(mlp(x))), stored
        y, stored = attention(norms[0](x), rotary, mask, cache)
        x = x + drop(y)
        return x + drop(mlp(norms[1](x))), stored


def make_blocks(model: Any, *, post_norm: bool, **fields: Any) -> list[nn.Module]:
    """The blocks of a model, whose attributes are the sizes unless `fields` say otherwise."""
    own = {field.name for field in dataclasses.fields(Sizes)} - fields.keys()
    sizes = Sizes(**fields, **{name: getattr(model, name) for name in own})
    block = nn.remat(Block, static_argnums=(5,)) if model.remat else Block  # 5 is `train`
    return [block(sizes, post_norm) for _ in range(model.depth)]


# The attributes that are counts, and their smallest values.
_COUNTS = {
    "vocab_size": 1,
    "width": 1,
    "depth": 0,
    "num_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 1,
    "mlp_width": 1,
    "max_length": 1,
    "num_token_types": 0,
    "num_classes": 0,
    "position_offset": 0,
}


def check_fields(model: nn.Module) -> None:
    """Raises ValueError for attributes out of range."""
    for name, at_least in _COUNTS.items():
        check_count(name, getattr(model, name, None), at_least=at_least)
    check_choice("activation", model.activation, ACTIVATIONS)
    check_number("norm_epsilon", model.norm_epsilon, at_least=0)
    check_number("dropout", model.dropout, at_least=0, at_most=1)


def check_tokens(max_length: int | None, **arrays: jax.Array | None) -> None:
    """Raises ValueError unless the first array, and those beside it, are integers [batch, time]."""
    given = {name: array for name, array in arrays.items() if array is not None}
    first = next(iter(given))
    shape = jnp.shape(given[first])
    for name, array in given.items():
        if jnp.ndim(array) != 2 or not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            got = f"shape {jnp.shape(array)} of {jnp.result_type(array)}"
            raise FieldError(name, "be integers [batch, time]", got)
        if jnp.shape(array) != shape:
            raise FieldError(name, f"have the shape of {first}, {shape}", jnp.shape(array))
        # Flax's lookup of embeddings cannot say how its result is split over explicit axes.
        placed = jax.typeof(array).sharding
        if placed.mesh.explicit_axes and any(placed.spec):
            raise FieldError(
                name, "be split over a mesh with automatic axes", placed.mesh,
                advice="make it by trustjax.parallel.make_mesh, or give jax.make_mesh "
                "axis_types=(jax.sharding.AxisType.Auto,)",
            )  # fmt: skip
    if max_length is not None and shape[1] > max_length:
        raise FieldError(first, f"be at most max_length = {max_length} a row", shape[1])


def segment_positions(segments: jax.Array) -> jax.Array:
    """Positions int32 [batch, time] that begin anew at 0 in each segment of [batch, time].

    >>> segment_positions(jnp.array([[0, 0, 1, 1, 1, 2, 2]]))
    Array([[0, 1, 0, 1, 2, 0, 1]], dtype=int32)
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    first = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
