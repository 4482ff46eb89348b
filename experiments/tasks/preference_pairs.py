"""Pairs of answers for preference training: made by a rule, and as rows of tokens."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from experiments.tasks.language_model import answer_tokens, prompt_tokens, rows_of
from trustjax._checks import FieldError, check_count, check_number
from trustjax.data import PreferenceDataset, Tokenizer, python_topics


def plain_words(
    prompt_words: int = 4,
    shortest_answer: int = 5,
    longest_answer: int = 12,
    margin: float = 0.5,
) -> PreferenceDataset:
    """Passages of Python's `help()`, of which the one in shorter words is preferred.

    The text is cut into passages of a prompt and an answer. Two passages, drawn at random, make a
    pair: the prompt of the first with both answers, of which the one with fewer characters per word
    is chosen, whether or not it is the one that belongs to the prompt. So what a model of the text
    thinks likely says little about the preference. No passage is in two pairs. Nothing is
    downloaded.

    Args:
      prompt_words: Words of a prompt, >= 1.
      shortest_answer: Words of the shortest answers, >= 1.
      longest_answer: Words of the longest ones.
      margin: Least difference of the two answers in characters per word, >= 0; closer pairs are
        left out.

    Raises:
      ValueError: A number is out of range, or no pair is left.
    """
    check_count("prompt_words", prompt_words, at_least=1)
    check_count("shortest_answer", shortest_answer, at_least=1)
    check_count("longest_answer", longest_answer, at_least=shortest_answer)
    check_number("margin", margin, at_least=0.0)
    random = np.random.default_rng(0)
    passages = list(_passages(random, prompt_words, shortest_answer, longest_answer))
    order = random.permutation(len(passages))
    prompts, chosen, rejected = [], [], []
    for first, second in zip(order[::2], order[1::2], strict=False):
        prompt, *answers = passages[first][0], passages[first][1], passages[second][1]
        plainer, longer = sorted(answers, key=characters_per_word)
        if characters_per_word(longer) - characters_per_word(plainer) > margin:
            prompts.append(prompt)
            chosen.append(plainer)
            rejected.append(longer)
    if not prompts:
        raise FieldError("margin", "leave at least one pair", margin)
    return PreferenceDataset(tuple(prompts), tuple(chosen), tuple(rejected), "plain_words")


def characters_per_word(text: str) -> float:
    """The mean number of characters between white space, the quantity of the rule."""
    return float(np.mean([len(word) for word in text.split()]))


def _passages(
    random: np.random.Generator, prompt_words: int, shortest: int, longest: int
) -> Iterator[tuple[str, str]]:
    """Prompts with the words that follow them; the answers begin with a space."""
    for document in python_topics().documents:
        # Not the rules of tables.
        words, start = [w for w in document.split() if any(map(str.isalnum, w))], 0
        while start + prompt_words + longest <= len(words):
            middle = start + prompt_words
            end = middle + int(random.integers(shortest, longest + 1))
            yield " ".join(words[start:middle]), " " + " ".join(words[middle:end])
            start = end


class PairTokens(NamedTuple):
    """Pairs as rows of tokens, a data set of `trustjax.data.Batches`.

    Pair i has four rows: its prompt with the chosen and the rejected answer, and with both answers
    of the next pair, the mismatched ones. Its number is i, or, with the two answers swapped, as by
    a wrong label, pairs + i.

    Attributes:
      tokens: Tokens, int32 [pairs, 4, length].
      segments: 1 at tokens, 0 at padding, int32 [pairs, 4, length].
      answer: Whether a token belongs to the answer, bool [pairs, 4, length].
    """

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    answer: npt.NDArray[np.bool_]

    @property
    def num_examples(self) -> int:
        """How many numbers there are: each pair has two."""
        return 2 * len(self.tokens)

    def batch(self, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """The pairs of these numbers [...], each array with the axes of `rows` first.

        Beside the three arrays there are "pair", int [...], and "order", int [..., 4]: the pair and
        the row of it that each row was.
        """
        pair = rows % len(self.tokens)
        swapped = rows[..., None] >= len(self.tokens)
        order = np.where(swapped, [1, 0, 3, 2], [0, 1, 2, 3])
        taken = (pair[..., None], order)
        return {
            "tokens": self.tokens[taken],
            "segments": self.segments[taken],
            "answer": self.answer[taken],
            "pair": pair,
            "order": order,
        }


def pair_tokens(
    data: PreferenceDataset, tokenizer: Tokenizer, most_prompt: int, most_answer: int
) -> PairTokens:
    """The pairs as rows of tokens.

    Args:
      data: The pairs.
      tokenizer: The tokenizer.
      most_prompt: Most tokens of a prompt, whose beginning is cut off.
      most_answer: Most tokens of an answer, whose end is cut off.
    """
    prompts = [prompt_tokens(tokenizer, prompt, most_prompt) for prompt in data.prompts]
    chosen, rejected = (
        [
            answer_tokens(tokenizer, prompt, answer, most_answer)
            for prompt, answer in zip(data.prompts, answers, strict=True)
        ]
        for answers in (data.chosen, data.rejected)
    )
    answers = [
        one
        for pair in range(len(prompts))
        for one in (chosen[pair], rejected[pair], chosen[pair - 1], rejected[pair - 1])
    ]
    repeated = [prompt for prompt in prompts for _ in range(4)]
    rows = rows_of(repeated, answers, tokenizer.pad_token)
    shape = (len(prompts), 4, -1)
    return PairTokens(
        rows.tokens.reshape(shape), rows.segments.reshape(shape), rows.answer.reshape(shape)
    )
