"""Language models of experiments: new or from a checkpoint, with all weights trained or LoRA.

What tasks on text share: the network with its tokenizer (`LanguageModel`, a file of conf/model),
prompts and answers as tokens, and the log-probabilities of answers without the array of all logits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_count, check_number
from trustjax.data import (
    DataError,
    Tokenizer,
    byte_tokenizer,
    pretrained_tokenizer,
    word_tokenizer,
)
from trustjax.data.conversations import Text
from trustjax.losses import fused_cross_entropy, token_log_probs
from trustjax.models import Decoder, PretrainedDecoder, lora_init, lora_merge
from trustjax.models.lora import lora_factors, lora_tree
from trustjax.models.text_checkpoint import pretrained_transformer

PyTree = Any


class Rows(NamedTuple):
    """Prompts with their answers, in rows of equal length.

    Attributes:
      tokens: Tokens, int32 [..., length].
      segments: 1 at tokens, 0 at padding, int32 [..., length].
      answer: Whether a token belongs to the answer, bool [..., length].
    """

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    answer: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Network:
    """A decoder whose weights have a frozen part, which all seeds share, and a part to train.

    Attributes:
      model: The decoder.
      tokenizer: Its tokenizer.
      loaded: Parameters of the checkpoint; None for a new network.
      lora_rank: Rank of the change to the frozen weights; None trains all weights.
      lora_alpha: Scale of that change.
    """

    model: Decoder
    tokenizer: Tokenizer
    loaded: PyTree | None
    lora_rank: int | None
    lora_alpha: float

    @property
    def frozen(self) -> PyTree:
        """The frozen weights, without an axis of seeds; empty if all are trained.

        They are an argument of compiled functions, not a constant in them.
        """
        return {} if self.lora_rank is None else self.loaded

    def check_length(self, field: str, length: int) -> None:
        """Raises FieldError if the model has no positions for rows of so many tokens."""
        most = self.model.max_length if self.model.positions == "learned" else length
        if length > most:
            raise FieldError(field, f"be at most {most}, the positions of the model", length)

    def init(self, keys: jax.Array) -> PyTree:
        """The part to train before the first step, with a leading axis for `keys`."""
        if self.lora_rank is not None:
            rank = self.lora_rank
            return jax.vmap(lambda key: lora_tree(lora_init(key, self.loaded, rank=rank)))(keys)
        if self.loaded is not None:
            return jax.tree.map(lambda x: jnp.repeat(x[None], len(keys), 0), self.loaded)
        some = jnp.zeros((1, 2), jnp.int32)
        return jax.jit(jax.vmap(lambda key: self.model.init(key, some)["params"]))(keys)

    def params(self, frozen: PyTree, trained: PyTree) -> PyTree:
        """The parameters of `model` from both parts of one seed."""
        if self.lora_rank is None:
            return trained
        return lora_merge(frozen, lora_factors(trained), alpha=self.lora_alpha)


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A decoder of the given sizes with a tokenizer of its own, or a checkpoint with both.

    conf/model/decoder.yaml has the numbers; with `pretrained` the first five are not read.

    Attributes:
      width: Features of a token.
      depth: Number of blocks.
      num_heads: Attention heads of a block.
      mlp_width: Hidden width of a block's MLP.
      vocab_size: Most words of the tokenizer; None for a tokenizer of bytes.
      pretrained: Hugging Face folder or hub id of a Llama, Qwen2, Qwen3, SmolLM2 or GPT-2, with its
        tokenizer; None for a new decoder.
      lora_rank: Rank of LoRA on queries and values; None trains all weights.
      lora_alpha: Scale of LoRA.
      remat: Whether the gradient recomputes the activations of blocks, to save memory.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    vocab_size: int | None = None
    pretrained: str | None = None
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    remat: bool = False

    def __post_init__(self) -> None:
        check_count("vocab_size", self.vocab_size, at_least=3)
        check_count("lora_rank", self.lora_rank, at_least=1)
        check_number("lora_alpha", self.lora_alpha, above=0)
        if self.lora_rank is not None and self.pretrained is None:
            raise FieldError("lora_rank", "be null without pretrained", self.lora_rank)

    def build(self, texts: Iterable[str], dtype: DTypeLike) -> Network:
        """The network with its tokenizer; `texts` are those that a tokenizer of words counts in.

        Raises CheckpointError or DataError for a checkpoint that cannot be read, and FieldError for
        one of an encoder.
        """
        if self.pretrained is not None:
            model, tokenizer = self.checkpoint(dtype)
            loaded = model.load_pretrained()
            return Network(model, tokenizer, loaded, self.lora_rank, self.lora_alpha)
        own = byte_tokenizer()
        if self.vocab_size is not None:
            own = word_tokenizer(texts, self.vocab_size)
        new = Decoder(
            own.vocab_size, self.width, self.depth, self.num_heads, self.mlp_width,
            remat=self.remat, dtype=dtype,
        )  # fmt: skip
        return Network(new, own, None, None, self.lora_alpha)

    def checkpoint(self, dtype: DTypeLike) -> tuple[PretrainedDecoder, Tokenizer]:
        """The decoder of the checkpoint and its tokenizer, without the weights; see `build`."""
        model: Any = pretrained_transformer(str(self.pretrained), remat=self.remat, dtype=dtype)
        if not isinstance(model, PretrainedDecoder):
            raise FieldError("pretrained", "be a decoder", type(model).__name__)
        return model, pretrained_tokenizer(model.folder)


def plain(text: Text) -> str:
    """The text, or the contents of the messages of a conversation."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def prompt_tokens(tokenizer: Tokenizer, prompt: Text, limit: int) -> list[int]:
    """The last `limit` tokens of a prompt, at least one, behind the token that begins a text.

    A conversation takes the form of the tokenizer's chat template. An empty prompt is a stop token,
    as between two documents.
    """
    if isinstance(prompt, str):
        # Its first token, such as that of a beginning, stays; its last one would end the text.
        begin = list(tokenizer.prefix)[:limit]
        rest = tokenizer.encode(prompt, special=False) or list(tokenizer.stop_tokens[:1])
        return begin + rest[max(0, len(rest) - (limit - len(begin))) :]
    tokens = tokenizer.encode(tokenizer.chat(prompt), special=False)  # a template has its own
    return tokens[-limit:]


def answer_tokens(tokenizer: Tokenizer, prompt: Text, answer: Text, limit: int) -> list[int]:
    """The first `limit` tokens of an answer, with the stop token at its end.

    Raises DataError for a conversation to whose prompt the chat template gives another form when
    the answer follows.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        tokens = [*tokenizer.encode(answer, special=False), *tokenizer.stop_tokens[:1]]
    elif isinstance(prompt, str) or isinstance(answer, str):
        raise DataError("prompt and answer must both be strings or both be conversations")
    else:
        before = tokenizer.chat(prompt)
        whole = tokenizer.chat([*prompt, *answer], add_generation_prompt=False)
        if not whole.startswith(before):
            raise DataError("the chat template changes the prompt when an answer follows")
        tokens = tokenizer.encode(whole[len(before) :], special=False)
    return tokens[:limit]


def rows_of(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_token: int
) -> Rows:
    """Every prompt with its answer in a row, padded on the right to the longest."""
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = np.full((len(prompts), length), pad_token, np.int32)
    segments, answer = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row, (before, behind) in enumerate(zip(prompts, answers, strict=True)):
        begin, end = len(before), len(before) + len(behind)
        tokens[row, :end] = [*before, *behind]
        segments[row, :end] = 1
        answer[row, begin:end] = True
    return Rows(tokens, segments, answer)


def answer_log_probs(
    model: Decoder, params: PyTree, tokens: jax.Array, segments: jax.Array, answer: jax.Array
) -> jax.Array:
    r"""log pi(y | x): the sum over the tokens of each answer, without the array of all logits.

    .. math:: \log\pi(y | x) = \sum_t \log\pi(y_t | x, y_{<t})

    Args:
      model: The decoder.
      params: Its parameters.
      tokens, segments, answer: As in `Rows`, [rows, length].

    Returns:
      Sums [rows] in float32 at least, 0 for a row without an answer.
    """
    hidden, head = _before_head(model, params, tokens, segments)
    # The token at t is predicted at t - 1.
    return jnp.sum(token_log_probs(hidden, head, tokens[:, 1:], where=answer[:, 1:]), -1)


def language_loss(
    model: Decoder, params: PyTree, tokens: jax.Array, segments: jax.Array
) -> jax.Array:
    """Mean cross-entropy of every token that has one before it, [] in nats per token.

    `tokens` and `segments` are those of `Rows`, [rows, length], one document in a row.
    """
    hidden, head = _before_head(model, params, tokens, segments)
    return fused_cross_entropy(hidden, head, tokens[:, 1:], where=segments[:, 1:] > 0)


def _before_head(
    model: Decoder, params: PyTree, tokens: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the head makes logits of at all tokens but the last, and the head."""
    hidden: Any = model.apply(
        {"params": params}, tokens[:, :-1], segments=segments[:, :-1], method="hidden"
    )
    return hidden, model.head_matrix(params)
