"""Transfer of language models: domains are genres, and the score is perplexity.

The experiments of TRAM on M2D2 (arXiv:2310.03646, Section 4 and Tables 4, 9 and 11): a model is
fine-tuned on one domain, and its perplexity is measured on that one and on all others; see
`transfer`. With all genres as the target and no pre-training it compares optimizers from scratch.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from experiments.runtime.task import Summary
from experiments.tasks.adaptation_measures import Measures, domain_measures, validation_measures
from experiments.tasks.genres import Domains, Genres
from experiments.tasks.language_model import LanguageModel
from experiments.tasks.objectives import Batch, NextToken
from experiments.tasks.search import VALIDATION_LOSS, Measure
from experiments.tasks.supervised import PRECISIONS
from experiments.tasks.transfer import Transfer
from experiments.trackers import Row
from trustjax._checks import FieldError, check_count
from trustjax.data import PackedTokens, pack, split


@dataclass(kw_only=True)
class LanguageTransfer(Transfer):
    """Configuration and stages; conf/exp/tram_lm.yaml and auon_lm.yaml have the numbers.

    An example is a row of tokens. The documents of every genre are split, never cut: 65 % train, on
    10 % trials of a search are judged, and 25 % are tested on.

    Attributes:
      text: The genres, and which of them are source, target and unseen.
      model: The language model. A tokenizer of words counts in the documents that it is first
        trained on.
      row_length: Tokens of a row.
    """

    text: Genres
    model: LanguageModel
    row_length: int

    metric: ClassVar[str] = "perplexity"
    rankings: ClassVar[Sequence[Measure]] = VALIDATION_LOSS

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        super().validate()
        check_count("row_length", self.row_length, at_least=2)
        if bool(self.text.source) != bool(self.pretrain_steps):
            must = "be above 0 with genres in text.source, and 0 without"
            raise FieldError("pretrain_steps", must, self.pretrain_steps)

    def summarize(self, rows: list[Row]) -> Summary:
        """`Transfer.summarize`, and how the perplexities of genres go with that of the target."""
        found = super().summarize(rows)
        if self.search is not None:
            return found
        from experiments.tasks import language_report

        return language_report.with_genres_and_time(found, rows, self._names())

    def plot(self, rows: list[Row], folder: Path) -> None:
        """The figures of `Transfer.plot`, and one of time and one of genres."""
        super().plot(rows, folder)
        if self.search is None:
            from experiments.tasks import language_report

            language_report.plot(rows, self._names(), folder)

    # Data

    @functools.cached_property
    def _domains(self) -> Domains:
        return self.text.load()

    @functools.cached_property
    def _parts(self) -> dict[str, np.ndarray]:
        """Numbers of documents by purpose, the same for every seed."""
        fractions = {"train": 0.65, "validation": 0.1, "test": 0.25}
        return split(self._domains.text, fractions, seed=0)

    def _documents(self, genres: Sequence[str], part: str) -> list[str]:
        text = self._domains.text
        labels = {text.label_names.index(genre) for genre in genres}
        return [text.documents[n] for n in self._parts[part] if text.labels[n] in labels]

    def _rows_of(self, genres: Sequence[str], part: str) -> PackedTokens:
        """The documents as rows of tokens, in random order."""
        encode = self._objective.network.tokenizer.encode
        packed = pack([encode(text) for text in self._documents(genres, part)], self.row_length)
        order = np.random.default_rng(0).permutation(packed.num_examples)
        return PackedTokens(*(array[order] for array in packed))

    def _examples(self, part: str) -> tuple[PackedTokens, int]:
        domains = self._domains
        genres = domains.source if part == "pretrain" else domains.target
        packed = self._rows_of(genres, "train")
        return packed, packed.num_examples

    @functools.cached_property
    def _held_out(self) -> Batch:
        """Equally many rows of every domain."""
        domains = self._domains
        if self.grid is not None:
            packed = [self._rows_of(domains.target, "validation")]
        else:
            known = [domains.source, domains.target, *((genre,) for genre in domains.unseen)]
            packed = [self._rows_of(genres, "test") for genres in known if genres]
        count = min(self.max_test_examples, *(each.num_examples for each in packed))
        batches = [each.batch(np.arange(count)) for each in packed]
        batch: Batch = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        return batch

    # Networks

    @functools.cached_property
    def _objective(self) -> NextToken:
        domains = self._domains
        texts = self._documents(domains.source or domains.target, "train")
        network = self.model.build(texts, PRECISIONS[self.precision])
        network.check_length("row_length", self.row_length)
        return NextToken(network, self.input_noise)

    def _make_measures(self) -> Measures:
        if self.grid is not None:
            return validation_measures(self._objective, self.metric)
        return domain_measures(
            self._objective,
            self.metric,
            self._domains.unseen,
            self.sharpness_examples,
            has_source=bool(self._domains.source),
            is_parallel=False,
        )
