"""Transfer between languages: fine-tune a multilingual encoder on one, test it on all others.

The experiments of TRAM on XNLI (arXiv:2310.03646, Section 4 and Tables 5, 6 and 12), here also on
parts of speech; see `transfer`. The embeddings and the lower blocks of the encoder are frozen, so
what they make of every text is computed once, and only the blocks above are trained.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from experiments.runtime.task import Summary
from experiments.tasks.adaptation_measures import Measures, domain_measures, validation_measures
from experiments.tasks.encoders import Pretrained
from experiments.tasks.languages import Languages, Text
from experiments.tasks.objectives import Batch, PyTree
from experiments.tasks.supervised import PRECISIONS
from experiments.tasks.transfer import Transfer
from experiments.trackers import Row
from trustjax._checks import FieldError, check_count
from trustjax.data import Tokenizer
from trustjax.models import Encoder, mean_pool

_TOGETHER = 32  # texts in one pass through the frozen blocks


class EncodedTexts(NamedTuple):
    """Texts as the frozen blocks leave them.

    Attributes:
      hidden: Hidden states, float32 [texts, length, width].
      segments: 1 at tokens, 0 at padding, int32 [texts, length].
      label: Class of the token, int32 [texts, length].
      mask: Whether the token has a class, bool [texts, length].
    """

    hidden: npt.NDArray[np.float32]
    segments: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]

    @property
    def num_examples(self) -> int:
        """How many texts there are."""
        return len(self.hidden)

    def batch(self, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """The texts of the rows, int64 [...]: arrays [..., length(, width)] by name."""
        return {name: array[rows] for name, array in self._asdict().items()}


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """Classes of tokens: batches as `EncodedTexts` has them.

    Attributes:
      model: Encoder with the head "tokens".
      blocks: Pre-trained parameters of the blocks that are trained.
      first_block: The first block that is trained.
      input_noise: Standard deviation of the Gaussian noise on the hidden states below that block.
    """

    model: Encoder
    blocks: PyTree
    first_block: int
    input_noise: float

    @property
    def frozen(self) -> PyTree:
        """Nothing, as the frozen blocks are not evaluated again."""
        return {}

    @property
    def trainable(self) -> None:
        """All parameters, of which the frozen blocks are none."""

    def initial(self, keys: jax.Array) -> tuple[PyTree, PyTree]:
        """The upper blocks as they are pre-trained, and a new head for each key."""
        params = jax.tree.map(lambda x: jnp.repeat(x[None], len(keys), 0), self.blocks)
        shape = (self.model.width, self.model.num_classes)
        kernel = jax.vmap(lambda key: 0.02 * jax.random.normal(key, shape))(keys)
        bias = jnp.zeros((len(keys), self.model.num_classes))
        return {**params, "classifier": {"kernel": kernel, "bias": bias}}, {}

    def outputs(
        self,
        frozen: PyTree,
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        noise_key: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """Logits of every token, [texts, length, classes]; there is no dropout."""
        hidden = self._upper(params, batch, noise_key)
        head = params["classifier"]
        return hidden @ head["kernel"] + head["bias"], model_state

    def labels(self, batch: Batch) -> jax.Array:
        """The classes of tokens."""
        return batch["label"]

    def where(self, batch: Batch) -> jax.Array:
        """Tokens that have a class."""
        return batch["mask"]

    def features(
        self, frozen: PyTree, params: PyTree, model_state: PyTree, batch: Batch
    ) -> jax.Array:
        """The mean of what enters the head over each text, of unit length."""
        return mean_pool(self._upper(params, batch, None), batch["segments"])

    def _upper(self, params: PyTree, batch: Batch, noise_key: jax.Array | None) -> jax.Array:
        def blocks(model: Encoder, x: jax.Array, segments: jax.Array) -> jax.Array:
            mask = (segments[:, :, None] == segments[:, None, :])[:, None]
            for block in model.block[self.first_block :]:
                x, _ = block(x, None, mask, None, False)
            return x

        hidden = batch["hidden"]
        if noise_key is not None:
            hidden = hidden + self.input_noise * jax.random.normal(noise_key, hidden.shape)
        found: Any = self.model.apply({"params": params}, hidden, batch["segments"], method=blocks)
        return jnp.asarray(found)


@dataclass(kw_only=True)
class CrossLingual(Transfer):
    """Configuration and stages; conf/exp/tram_crosslingual.yaml has the numbers.

    The target is the language that is trained, and the others are unseen. The test texts say the
    same in all languages, which allows comparing features.

    Attributes:
      languages: Makes the texts.
      encoder: Makes the encoder with its weights and tokenizer.
      frozen_blocks: Number of lower blocks that are not trained, besides the embeddings.
      row_length: Most tokens of a text; later words are cut off.
      pretrain_steps: 0, as the encoder is pre-trained.
      pretrain_learning_rate: Not needed.
    """

    languages: Callable[[], Languages]
    encoder: Callable[[], Pretrained]
    frozen_blocks: int
    row_length: int
    pretrain_steps: int = 0
    pretrain_learning_rate: float = 1.0

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        super().validate()
        check_count("frozen_blocks", self.frozen_blocks, at_least=0)
        check_count("row_length", self.row_length, at_least=3)
        if self.pretrain_steps:
            raise FieldError("pretrain_steps", "be 0, as the encoder is", self.pretrain_steps)

    def summarize(self, rows: list[Row]) -> Summary:
        """`Transfer.summarize`, and means over near and distant languages."""
        found = super().summarize(rows)
        if self.search is not None:
            return found
        from experiments.tasks.adaptation_report import finals_of
        from experiments.tasks.language_report import with_groups

        finals = {name: finals_of(rows, name) for name in self._names()}
        values = with_groups(found.values, finals, self._names(), self._texts.families)
        return found._replace(values=values)

    # Data

    @functools.cached_property
    def _texts(self) -> Languages:
        return self.languages()

    @functools.cached_property
    def _pretrained(self) -> Pretrained:
        return self.encoder()

    @property
    def _upper_blocks(self) -> list[str]:
        """Names of the blocks that are trained."""
        depth = self._pretrained.model.depth
        if self.frozen_blocks >= depth:
            must = f"be < {depth}, the encoder's blocks"
            raise FieldError("frozen_blocks", must, self.frozen_blocks)
        return [f"block_{number}" for number in range(self.frozen_blocks, depth)]

    @functools.cached_property
    def _lower(self) -> Callable[[npt.NDArray[Any], npt.NDArray[Any]], jax.Array]:
        """The frozen part: `(tokens, segments) -> hidden`."""
        model, params, _ = self._pretrained
        lower = model.clone(depth=self.frozen_blocks, dtype=PRECISIONS[self.precision])
        own = {name: x for name, x in params.items() if name not in self._upper_blocks}
        compiled = jax.jit(lower.apply)

        def apply(tokens: npt.NDArray[Any], segments: npt.NDArray[Any]) -> jax.Array:
            found: Any = compiled({"params": own}, tokens, segments=segments)
            return jnp.asarray(found, jnp.float32)

        return apply

    def _encoded(self, texts: Sequence[Text]) -> EncodedTexts:
        """The texts after the frozen blocks."""
        tokenizer = self._pretrained.tokenizer
        rows = [tokens_of(text, tokenizer, self._texts.is_words, self.row_length) for text in texts]
        tokens, segments = tokenizer.pad([row for row, _ in rows], length=self.row_length)
        label = np.full(tokens.shape, -1, np.int32)
        for number, (_, labels) in enumerate(rows):
            label[number, : len(labels)] = labels
        hidden = []
        for start in range(0, len(rows), _TOGETHER):
            few = [x[start : start + _TOGETHER] for x in (tokens, segments)]
            # The last ones are repeated to fill up, so that one program serves all.
            full = [np.resize(x, (_TOGETHER, self.row_length)) for x in few]
            hidden.append(np.asarray(self._lower(*full))[: len(few[0])])
        return EncodedTexts(np.concatenate(hidden), segments, np.maximum(label, 0), label >= 0)

    def _examples(self, part: str) -> tuple[EncodedTexts, int]:
        # As many as all seeds need: what the frozen blocks make of a large set fills the memory.
        encoded = self._encoded(self._texts.train[: self.num_seeds * self.finetune_examples])
        return encoded, encoded.num_examples

    @functools.cached_property
    def _held_out(self) -> Batch:
        texts, few = self._texts, slice(0, self.max_test_examples)
        chosen = [texts.validation] if self.grid is not None else [*texts.tests.values()]
        encoded = [self._encoded(each[few]) for each in chosen]
        batches = [each.batch(np.arange(each.num_examples)) for each in encoded]
        batch: Batch = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        return batch

    # Networks

    @functools.cached_property
    def _objective(self) -> TokenClasses:
        model, params, _ = self._pretrained
        tagger = model.clone(
            head="tokens", num_classes=len(self._texts.classes), pooler=False,
            dtype=PRECISIONS[self.precision],
        )  # fmt: skip
        upper = {name: params[name] for name in self._upper_blocks}
        return TokenClasses(tagger, upper, self.frozen_blocks, self.input_noise)

    def _make_measures(self) -> Measures:
        if self.grid is not None:
            return validation_measures(self._objective, self.metric)
        unseen = list(self._texts.tests)[1:]
        return domain_measures(
            self._objective, self.metric, unseen, self.sharpness_examples, has_source=False
        )


def tokens_of(
    text: Text, tokenizer: Tokenizer, is_words: bool, limit: int
) -> tuple[list[int], list[int]]:
    """The first `limit` tokens of a text, and their classes; -1 for none.

    A word's class is that of its first token that stands for more than a space. SentencePiece often
    makes the space before a word a token of its own; it is left out where the text has no space, as
    in Chinese or before a full stop. The class of a pair of sentences is that of the first token of
    the row, and two suffixes stand between the sentences, as XLM-RoBERTa has them.
    """
    tokens, labels = [*tokenizer.prefix], [-1] * len(tokenizer.prefix)
    room = limit - len(tokenizer.suffix)
    for number, (part, label) in enumerate(zip(text.parts, text.labels, strict=True)):
        pieces = tokenizer.encode(part, special=False)
        classes = [-1] * len(pieces)
        if is_words and pieces:
            written = [bool(tokenizer.decode([piece]).strip()) for piece in pieces]
            first = written.index(True) if any(written) else 0
            classes[first] = label
            if first and any(text.joined[number : number + 1]):
                pieces, classes = pieces[first:], classes[first:]
        if is_words and len(tokens) + len(pieces) > room:
            break
        if not is_words and number:
            pieces = [*tokenizer.suffix, *tokenizer.suffix, *pieces]
            classes = [-1] * len(pieces)
        tokens, labels = tokens + pieces, labels + classes
    tokens = [*tokens[:room], *tokenizer.suffix]
    labels = [*labels[:room], *[-1] * len(tokenizer.suffix)]
    if not is_words:
        labels[0] = text.labels[0]
    return tokens, labels
