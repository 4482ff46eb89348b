"""Text encoders: one module for BERT and XLM-RoBERTa.

Devlin et al. 2018, arXiv:1810.04805 (BERT); Conneau et al. 2019, arXiv:1911.02116 (XLM-RoBERTa).
`trustjax.models.pretrained_transformer` reads their checkpoints.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_choice
from trustjax.models._blocks import (
    ACTIVATIONS,
    INIT,
    check_fields,
    check_tokens,
    make_blocks,
    segment_positions,
)


class Encoder(nn.Module):
    """BERT: tokens that attend to all others, with norms after the sums.

    Attributes:
      vocab_size: Number of tokens.
      width: Number of features of a token, a multiple of `num_heads`.
      depth: Number of blocks.
      num_heads: Number of attention heads.
      mlp_width: Hidden width of a block's MLP.
      max_length: Number of tokens in a row at most; there are `position_offset` more positions.
      num_token_types: Number of token types, for which there are embeddings.
      position_offset: The position of the first token: 0 in BERT, 2 in XLM-RoBERTa.
      norm_epsilon: Epsilon of the layer norms.
      activation: "gelu", "gelu_tanh", "relu" or "silu".
      head: What `__call__` returns: None for the hidden states, "tokens" for logits of each token
        (tagging), "sequence" for logits of the row from its first token through a dense layer with
        tanh, "masked_lm" for logits over the vocabulary.
      num_classes: Number of logits of the heads "tokens" and "sequence".
      pooler: Whether there is the dense layer with tanh on the first token, which pre-training
        adds, without a head; `pooled` returns its output.
      dropout: Rate of dropout after the embeddings, attention, MLP and before a head, in [0, 1];
        not on the attention weights. In training it needs the `dropout` key.
      remat: Whether the gradient recomputes each block's activations instead of storing them.
      dtype: Dtype of the computation; parameters are float32, and logits too.

    Raises ValueError for numbers out of range, an unknown head, and a head without classes.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    max_length: int = 512
    num_token_types: int = 2
    position_offset: int = 0
    norm_epsilon: float = 1e-12
    activation: str = "gelu"
    head: str | None = None
    num_classes: int = 0
    pooler: bool = False
    dropout: float = 0.0
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks all that does not depend on the tokens."""
        check_fields(self)
        if self.head is not None:
            check_choice("head", self.head, ("tokens", "sequence", "masked_lm"))
        if self.width % self.num_heads:
            got = f"{self.width} and {self.num_heads}"
            raise FieldError("width", "be a multiple of num_heads", got)
        if (self.head in ("tokens", "sequence")) != (self.num_classes > 0):
            requirement = 'be above 0 with a head "tokens" or "sequence", and 0 without'
            raise FieldError("num_classes", requirement, f"{self.num_classes} and {self.head!r}")
        if self.pooler and self.head is not None:
            raise FieldError("pooler", "be False beside a head", self.pooler)
        super().__post_init__()

    def setup(self) -> None:
        """Makes the layers; the blocks are block_0, block_1 and so on."""

        def embed(number: int) -> nn.Embed:
            return nn.Embed(number, self.width, dtype=self.dtype, embedding_init=INIT)

        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=INIT)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, use_fast_variance=False)

        self.token_embedding = embed(self.vocab_size)
        self.position_embedding = embed(self.max_length + self.position_offset)
        if self.num_token_types:
            self.type_embedding = embed(self.num_token_types)
        self.embedding_norm = norm()
        self.block = make_blocks(
            self,
            post_norm=True,
            num_kv_heads=self.num_heads,
            head_dim=self.width // self.num_heads,
            norm="layer",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            qk_norm=False,
            gated=False,
            causal=False,
        )
        if self.pooler or self.head == "sequence":
            self.pooler_dense = dense(self.width)
        if self.num_classes:
            self.classifier = dense(self.num_classes)
        if self.head == "masked_lm":
            self.masked_lm_dense, self.masked_lm_norm = dense(self.width), norm()
            self.masked_lm_bias = self.param(
                "masked_lm_bias", nn.initializers.zeros, (self.vocab_size,)
            )
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        types: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """What `head` says: float32 logits, or the hidden states [batch, time, width].

        Args:
          tokens: Integers [batch, time].
          positions: Integers [batch, time]. By default they begin at 0 in each segment.
          segments: Integers [batch, time]: 0 at padding, elsewhere the number of the document. By
            default all tokens are of document 1.
          types: Token types, integers [batch, time]; zeros by default.
          train: Whether dropout is on.

        Returns:
          Hidden states; or logits [batch, time, num_classes] of tokens, [batch, num_classes] of
          the sequence, or [batch, time, vocab_size] of masked tokens.
        """
        x = self.hidden(tokens, positions=positions, segments=segments, types=types, train=train)
        if self.head is None:
            if self.pooler and self.is_initializing():
                self.pooler_dense(x[:, 0])  # `pooled` uses it
            return x
        if self.head == "masked_lm":
            x = self.masked_lm_norm(ACTIVATIONS[self.activation](self.masked_lm_dense(x)))
            table = self.token_embedding.embedding.astype(x.dtype)
            logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
            return logits + self.masked_lm_bias
        if self.head == "sequence":
            x = self.drop(x[:, 0], deterministic=not train)
            x = jnp.tanh(self.pooler_dense(x))
        return self.classifier(self.drop(x, deterministic=not train)).astype(jnp.float32)

    def pooled(self, tokens: jax.Array, **arguments: Any) -> jax.Array:
        """The pooler's output [batch, width]; the arguments are those of `__call__`."""
        return jnp.tanh(self.pooler_dense(self.hidden(tokens, **arguments)[:, 0]))

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        types: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """The hidden states [batch, time, width] of `dtype`; the arguments of `__call__`."""
        check_tokens(
            self.max_length, tokens=tokens, positions=positions, segments=segments, types=types
        )
        if segments is None:
            segments = jnp.ones_like(tokens, jnp.int32)
        positions = segment_positions(segments) if positions is None else positions
        x = self.token_embedding(tokens) + self.position_embedding(positions + self.position_offset)
        if self.num_token_types:
            x = x + self.type_embedding(jnp.zeros_like(tokens) if types is None else types)
        elif types is not None:
            raise FieldError("types", "be None for an encoder without token types", "an array")
        x = self.drop(self.embedding_norm(x), deterministic=not train)
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
        for block in self.block:
            x, _ = block(x, None, mask, None, train)
        return jnp.asarray(x)


def mean_pool(hidden: jax.Array, segments: jax.Array) -> jax.Array:
    """Unit-length means [batch, width] of the tokens that are no padding: sentence embeddings.

    Reimers and Gurevych 2019, Sentence-BERT, arXiv:1908.10084.

    Args:
      hidden: Hidden states [batch, time, width].
      segments: Integers [batch, time], 0 at padding. A row without tokens gives zeros.
    """
    weights = (segments != 0).astype(jnp.float32)[..., None]
    total = jnp.sum(weights * hidden.astype(jnp.float32), axis=1)
    norm = jnp.linalg.norm(total, axis=-1, keepdims=True)  # the mean's direction is the sum's
    return total / jnp.where(norm > 0, norm, 1)
