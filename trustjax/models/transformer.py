"""Language models: one decoder for GPT-2, Llama, Qwen2, Qwen3 and SmolLM2.

Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2); Touvron et al.
2023, arXiv:2302.13971 (Llama); Qwen2, arXiv:2407.10671; Qwen3, arXiv:2505.09388; SmolLM2,
arXiv:2502.02737. `trustjax.models.pretrained_transformer` reads their checkpoints.

Rows of tokens [batch, time] may hold padding and several documents: `segments` [batch, time] is 0
at padding and otherwise the number of the document, and tokens attend within their document only.
"""

from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_choice, check_count, check_number
from trustjax.models._blocks import (
    INIT,
    check_fields,
    check_tokens,
    make_blocks,
    segment_positions,
)
from trustjax.models._rotary import RopeScaling, rotary_tables

PyTree = Any


class KVCache(NamedTuple):
    """Keys and values of the tokens that a `Decoder` has seen, in arrays of static shape.

    All rows write to the same columns: a call with `time` tokens fills columns index to
    index + time - 1. Prompts of different lengths are padded, on either side; padding takes a
    column, but nothing attends to it, and it does not count in `lengths`. `Decoder.init_cache`
    makes an empty one.

    Attributes:
      keys: Rotated keys of each block, [batch, num_kv_heads, head_dim, capacity].
      values: Values of each block, [batch, num_kv_heads, capacity, head_dim].
      segments: int32 [batch, capacity], 0 at padding and at columns that are still empty.
      filled: int32 [], the number of columns that are filled.
      lengths: int32 [batch], tokens of each row without padding: the position of its next token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    segments: jax.Array
    filled: jax.Array
    lengths: jax.Array

    def repeat(self, count: int) -> Self:
        """The cache with each row `count` times in succession, for samples that share a prompt."""
        repeated: Self = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0) if x.ndim else x, self)
        return repeated

    def grown(self, columns: int) -> Self:
        """The cache with as many empty columns more."""
        keys, values = (
            tuple(jnp.pad(x, [(0, columns if a == axis else 0) for a in range(4)]) for x in blocks)
            for blocks, axis in ((self.keys, 3), (self.values, 2))
        )
        segments = jnp.pad(self.segments, ((0, 0), (0, columns)))
        return self._replace(keys=keys, values=values, segments=segments)


class Decoder(nn.Module):
    """Language model that predicts each token from those before it.

    The defaults are Llama's layers. GPT-2 has positions "learned", norm "layer", all biases, no
    gate, activation "gelu_tanh" and tied embeddings; Qwen2 has `qkv_bias`; Qwen3 has `qk_norm`.

    Attributes:
      vocab_size: Number of tokens.
      width: Number of features of a token.
      depth: Number of blocks.
      num_heads: Number of query heads.
      mlp_width: Hidden width of a block's MLP.
      max_length: Number of learned positions. Rotary ones have no limit; there it only documents
        the length of the pre-training.
      num_kv_heads: Number of heads of keys and values, a divisor of `num_heads`; None for as many.
      head_dim: Features of a head, even for rotary positions; None for width / num_heads.
      positions: "rotary", or "learned" embeddings, which are added to those of the tokens.
      rope_theta: Base of the rotary wavelengths.
      rope_scaling: How they are stretched; None for not at all.
      norm: "rms" or "layer", both before attention and MLP.
      norm_epsilon: Epsilon of the norms.
      qkv_bias: Whether query, key and value have biases.
      out_bias: Whether the layer after the attention has a bias.
      mlp_bias: Whether the layers of the MLP have biases.
      qk_norm: Whether each head's query and key go through an RMS norm before the rotation.
      gated: Whether the MLP has a gate, as SwiGLU has.
      activation: "silu", "gelu", "gelu_tanh" or "relu".
      tied: Whether the head is the transposed token embedding.
      dropout: Rate of dropout after the embeddings, attention and MLP, in [0, 1]; not on the
        attention weights. In training it needs the `dropout` key.
      remat: Whether the gradient recomputes each block's activations instead of storing them.
      dtype: Dtype of the computation; parameters are float32, and logits too.

    Raises ValueError for numbers out of range and for heads that do not divide.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    max_length: int = 2048
    num_kv_heads: int | None = None
    head_dim: int | None = None
    positions: str = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm: str = "rms"
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gated: bool = True
    activation: str = "silu"
    tied: bool = True
    dropout: float = 0.0
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks all that does not depend on the tokens, and fills in what is None."""
        check_fields(self)
        check_choice("positions", self.positions, ("rotary", "learned"))
        check_choice("norm", self.norm, ("rms", "layer"))
        check_number("rope_theta", self.rope_theta, above=0)
        kv_heads, head_dim = self.kv_sizes
        if self.num_heads % kv_heads:
            got = f"{self.num_heads} and {kv_heads}"
            raise FieldError("num_heads", "be a multiple of num_kv_heads", got)
        if self.head_dim is None and self.width % self.num_heads:
            got = f"{self.width} and {self.num_heads}"
            raise FieldError("width", "be a multiple of num_heads without a head_dim", got)
        if self.positions == "rotary" and head_dim % 2:
            raise FieldError("head_dim", "be even for rotary positions", head_dim)
        super().__post_init__()

    @property
    def kv_sizes(self) -> tuple[int, int]:
        """The number of heads of keys and values, and the features of a head."""
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        return kv_heads, self.width // self.num_heads if self.head_dim is None else self.head_dim

    def setup(self) -> None:
        """Makes the layers; the blocks are block_0, block_1 and so on."""
        self.token_embedding = nn.Embed(
            self.vocab_size, self.width, dtype=self.dtype, embedding_init=INIT
        )
        if self.positions == "learned":
            self.position_embedding = nn.Embed(
                self.max_length, self.width, dtype=self.dtype, embedding_init=INIT
            )
        kv_heads, head_dim = self.kv_sizes
        self.block = make_blocks(
            self, post_norm=False, causal=True, num_kv_heads=kv_heads, head_dim=head_dim
        )
        norm = nn.RMSNorm if self.norm == "rms" else nn.LayerNorm
        self.final_norm = norm(self.norm_epsilon, dtype=self.dtype, use_fast_variance=False)
        if not self.tied:
            self.head = nn.Dense(self.vocab_size, use_bias=False, kernel_init=INIT)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        train: bool = False,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Logits float32 [batch, time, vocab_size]; with a cache, the logits and the next cache.

        Args:
          tokens: Integers [batch, time].
          positions: Integers [batch, time]. By default they begin at 0 in each segment, and with a
            cache they go on at each row's length.
          segments: Integers [batch, time]: 0 at padding, elsewhere the number of the document. By
            default all tokens are of document 1. With a cache a row is one document.
          cache: What the earlier calls of this row have stored, or `init_cache`. The caller sees
            to it that `filled` + time is at most the capacity.
          train: Whether dropout is on.
        """
        out = self.hidden(tokens, positions=positions, segments=segments, cache=cache, train=train)
        if isinstance(out, tuple):
            return self.logits(out[0]), out[1]
        return self.logits(out)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        train: bool = False,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Like `__call__`, but the input of the head, [batch, time, width] of `dtype`.

        With `head_matrix` it is what losses and samplers need that never hold all logits:
        `model.apply({"params": params}, tokens, method="hidden")`.
        """
        limit = self.max_length if self.positions == "learned" else None
        check_tokens(limit, tokens=tokens, positions=positions, segments=segments)
        mask, positions, cache = _attended(tokens, positions, segments, cache)
        x = self.token_embedding(tokens)
        rotary = None
        if self.positions == "learned":
            x = x + self.position_embedding(positions)
        else:
            rotary = rotary_tables(positions, self.kv_sizes[1], self.rope_theta, self.rope_scaling)
        x = self.drop(x, deterministic=not train)
        stored = []
        for index, block in enumerate(self.block):
            past = None
            if cache is not None:
                past = (cache.keys[index], cache.values[index], cache.filled)
            x, keys_values = block(x, rotary, mask, past, train)
            stored.append(keys_values)
        x = jnp.asarray(self.final_norm(x))
        if cache is None:
            return x
        keys, values = (tuple(pair[side] for pair in stored) for side in (0, 1))
        filled = cache.filled + tokens.shape[1]
        return x, cache._replace(keys=keys, values=values, filled=filled)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 [..., vocab_size] of the head's input [..., width]."""
        if self.tied:
            table = self.token_embedding.embedding.astype(hidden.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
            return jnp.asarray(logits)
        return jnp.asarray(self.head(hidden), jnp.float32)

    @nn.nowrap
    def head_matrix(self, params: PyTree) -> jax.Array:
        """The head's kernel [width, vocab_size] in the parameters."""
        kernel: jax.Array = (
            params["token_embedding"]["embedding"].T if self.tied else params["head"]["kernel"]
        )
        return kernel

    @nn.nowrap
    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache of the computation's dtype for `capacity` columns of `batch` rows."""
        check_count("batch", batch, at_least=1)
        check_count("capacity", capacity, at_least=1)
        heads, dim = self.kv_sizes
        # The axes of both stand as the products of decoding read them, so that nothing is copied.
        keys, values = (
            tuple(jnp.zeros(shape, self.dtype) for _ in range(self.depth))
            for shape in ((batch, heads, dim, capacity), (batch, heads, capacity, dim))
        )
        return KVCache(
            keys,
            values,
            segments=jnp.zeros((batch, capacity), jnp.int32),
            filled=jnp.zeros((), jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
        )


def _attended(
    tokens: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
    cache: KVCache | None,
) -> tuple[jax.Array | None, jax.Array, KVCache | None]:
    """What each token attends to [batch, 1, time, columns], its position, the cache with segments.

    None as a mask is the plain causal one. Padding attends to padding, so that no row of the
    softmax is empty; nobody reads what it computes.
    """
    batch, time = tokens.shape
    if cache is None and segments is None:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), tokens.shape)
        return None, positions, None
    if segments is None:
        segments = jnp.ones_like(tokens, jnp.int32)
    segments = segments.astype(jnp.int32)
    columns, filled = segments, jnp.int32(0)
    if cache is None:
        positions = segment_positions(segments) if positions is None else positions
    else:
        if len(cache.lengths) != batch:
            raise FieldError("cache", f"have the {batch} rows of tokens", len(cache.lengths))
        capacity = cache.segments.shape[1]
        if time > capacity:
            raise FieldError("cache", f"have a capacity of {time} tokens or more", capacity)
        filled = cache.filled
        columns = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, filled, axis=1)
        seen = cache.lengths[:, None] + jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32)
        positions = jnp.maximum(seen - 1, 0) if positions is None else positions
        cache = cache._replace(segments=columns, lengths=seen[:, -1])
    same = segments[:, :, None] == columns[:, None, :]
    before = jnp.arange(columns.shape[1]) <= filled + jnp.arange(time)[:, None]
    return (same & before)[:, None], positions, cache
