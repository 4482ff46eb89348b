"""Knights and knaves for a language model of words: prompts, worked answers, and rewards in JAX.

A word is a token, and so is a tag, so that the rules of `knights_text` can be applied to tokens,
within a compiled training. The prompt ends with <think>; the model goes on from there. Tests
compare the levels with those that `score_answer` gives to the decoded texts.

The reward of the thinking is the share of its steps that are right: every "true" and "false" behind
an assignment, and every "yes" and "no", is checked with the statements of the puzzle.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_count, check_number
from trustjax.data.tokenizer import TokenBatch, Tokenizer, word_tokenizer
from trustjax.envs.knights import MOST_PEOPLE, Puzzle, truths
from trustjax.envs.knights_text import (
    EMPTY,
    MALFORMED,
    NAMES,
    REWARDS,
    ROLES,
    TAGS,
    puzzle_text,
    worked_answer,
)
from trustjax.envs.language import Prompts, Rewards, rewards_of


class Facts(NamedTuple):
    """What a reward must know of puzzles; those of few people are padded.

    Attributes:
      statements: int32 [..., people, 5].
      solution: Whether each person is a knight, bool [..., people].
      num_people: int32 [...].
      names: Token of each name, int32 [..., people], -1 for padding.
    """

    statements: jax.Array
    solution: jax.Array
    num_people: jax.Array
    names: jax.Array


@dataclass(frozen=True)
class Knights:
    """Knights and knaves in words.

    Attributes:
      names: Names to choose from, single words.
      most_people: Largest number of people in a puzzle, which is the size of the arrays.
      shuffled: Whether the names of a puzzle are drawn; otherwise it has the first ones in order,
        which is easier to learn.
      intro: Whether the prompt tells the rules of the island too, as in `puzzle_text`.
    """

    names: tuple[str, ...] = NAMES
    most_people: int = 3
    shuffled: bool = True
    intro: bool = False

    def __post_init__(self) -> None:
        """Checks the names."""
        object.__setattr__(self, "names", tuple(self.names))
        check_count("most_people", self.most_people, at_least=2)
        if self.most_people > MOST_PEOPLE:
            raise FieldError("most_people", f"be <= {MOST_PEOPLE}", self.most_people)
        if len(set(self.names)) < max(self.most_people, len(self.names)):
            requirement = f"be at least {self.most_people} different ones"
            raise FieldError("names", requirement, f"{self.names!r:.100}")
        for name in self.names:
            if not name.isalpha() or any(role in name.lower() for role in ROLES):
                raise FieldError("names", "be single words of letters", repr(name))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all words that occur; token 0 ends a text."""
        said = [[operator, 0, 0, 1, 1] for operator in range(6)]
        people = list(self.names[:2])
        texts = [
            puzzle_text(np.array([said[a], said[b]]), people) for a, b in ((0, 1), (2, 3), (4, 5))
        ]
        words = "try : true false yes no says is a"
        return word_tokenizer(
            [" ".join({*words.split(), *TAGS, *ROLES, *self.names}), *texts],
            pattern=r"</?\w+>|\w+|[^\w\s]",
        )

    def token(self, word: str) -> int:
        """The token of a word."""
        return self.tokenizer.encode(word, special=False)[0]

    def draw_names(self, num_people: int, rng: np.random.Generator) -> list[str]:
        """The names of one puzzle."""
        if not self.shuffled:
            return list(self.names[:num_people])
        return [str(name) for name in rng.permutation(self.names)[:num_people]]

    def prompts(
        self, puzzles: Sequence[Puzzle], seed: int = 0, *, guesses: float = 0.0
    ) -> tuple[Prompts, TokenBatch]:
        """Prompts of puzzles, and answers to them: right ones with reasoning, and guesses.

        Args:
          puzzles: Puzzles with a leading axis, such as one entry for each number of people.
          seed: Seed of the names and of the guesses.
          guesses: Share of the answers that have no reasoning, and roles at random, in [0, 1].

        Returns:
          The prompts, whose facts are `Facts`, and the rows of the answers, padded on the right,
          which end with the token that ends a text.

        Raises:
          ValueError: A puzzle has too many people, or `guesses` is out of range.
        """
        check_number("guesses", guesses, at_least=0.0, at_most=1.0)
        rng = np.random.default_rng(seed)
        # A generator of its own, so that the names are the same for all shares of guesses.
        guessing = np.random.default_rng([seed, 1])
        questions, answers, facts = [], [], []
        for group in puzzles:
            for statements, solution in zip(*group, strict=True):
                names = self.draw_names(len(statements), rng)
                question = puzzle_text(statements, names, intro=self.intro)
                questions.append(f"{question} {TAGS[0]}")
                guessed = guessing.random() < guesses
                roles = guessing.random(len(names)) < 0.5 if guessed else solution
                answer = worked_answer(Puzzle(statements, roles), names, reasoning=not guessed)
                answers.append(answer[len(TAGS[0]) :])
                facts.append(self._facts(statements, solution, names))
        rows = self.tokenizer.batch(questions, padding="left", special=False)
        stacked = Facts(*(jnp.asarray(np.stack(column)) for column in zip(*facts, strict=True)))
        prompts = Prompts(jnp.asarray(rows.tokens), jnp.asarray(rows.segments != 0), stacked)
        return prompts, self.tokenizer.batch(answers)

    def _facts(self, statements: np.ndarray, solution: np.ndarray, names: list[str]) -> Any:
        people, most = len(statements), self.most_people
        if people > most:
            raise FieldError("puzzles", f"have at most most_people = {most} people", people)
        padding = (0, most - people)
        arrays = (
            np.pad(statements, (padding, (0, 0))),
            np.pad(solution, padding),
            np.int32(people),
            np.pad([self.token(name) for name in names], padding, constant_values=-1).astype(
                np.int32
            ),
        )
        return arrays

    def reward(self, facts: Facts, tokens: jax.Array, mask: jax.Array) -> Rewards:
        """Levels, rewards and thinking of answers, by the rules of `knights_text`.

        Args:
          facts: Facts of the prompt of every answer, [answers, ...].
          tokens: Tokens of the answers, which follow <think>, int [answers, time].
          mask: True on the tokens of the answers, [answers, time].
        """
        tokens = jnp.where(mask, tokens, -1)
        level, reward = self._level(facts, tokens)
        return rewards_of(reward, level, self._thinking(facts, tokens))

    def _level(self, facts: Facts, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = jnp.arange(tokens.shape[1])
        # Well-formed: every tag once, in order. The first one stands in the prompt.
        tags = [tokens == self.token(tag) for tag in TAGS]
        counts = jnp.stack([jnp.sum(tag, -1) for tag in tags], -1)
        end, opened, closed = (jnp.argmax(tag, -1) for tag in tags[1:])
        well_formed = jnp.all(counts == jnp.array([0, 1, 1, 1]), -1)
        well_formed &= (end < opened) & (opened < closed)
        inside = (at > opened[:, None]) & (at < closed[:, None])
        # Roles occur once for each person; "knights" has one too.
        roles = jnp.where(inside & (tokens >= 0), jnp.asarray(self._role_counts)[tokens], 0)
        as_many = jnp.sum(roles, -1) == facts.num_people
        # "NAME is a ROLE": the first time counts.
        is_, a, role = (_ahead(tokens, n) for n in (1, 2, 3))
        knight, knave = self.token("knight"), self.token("knave")
        claims = (is_ == self.token("is")) & (a == self.token("a"))
        claims &= ((role == knight) | (role == knave)) & inside & _ahead(inside, 3)
        named = claims[:, :, None] & (tokens[:, :, None] == facts.names[:, None, :])
        claimed = jnp.take_along_axis(role, jnp.argmax(named, 1), 1) == knight
        there = jnp.arange(self.most_people) < facts.num_people[:, None]
        read = as_many & jnp.all(jnp.any(named, 1) | ~there, -1)
        right = jnp.all((claimed == facts.solution) | ~there, -1)
        empty = ~jnp.any(inside, -1)
        level = jnp.select([~well_formed | empty, ~read, ~right], [4, 3, 2], 1)
        by_level = jnp.array([REWARDS[1], REWARDS[2], REWARDS[3], EMPTY])
        return level, jnp.where(well_formed, by_level[level - 1], MALFORMED)

    @functools.cached_property
    def _role_counts(self) -> np.ndarray:
        """How often each token has the word of a role in it, int32 [vocab]."""
        words = [
            self.tokenizer.decode([token], stop=False) for token in range(self.tokenizer.vocab_size)
        ]
        return np.array(
            [sum(word.lower().count(role) for role in ROLES) for word in words], np.int32
        )

    def _thinking(self, facts: Facts, tokens: jax.Array) -> jax.Array:
        at = jnp.arange(tokens.shape[1])[None]
        true, false, yes, no = (
            tokens == self.token(word) for word in ("true", "false", "yes", "no")
        )
        thought = jnp.cumsum(tokens == self.token(TAGS[1]), 1) == 0
        # The assignment of the line that a token stands in, and its place behind the colon.
        line = jax.lax.cummax(jnp.where(tokens == self.token("try"), at, -1), axis=1)
        colon = jax.lax.cummax(jnp.where(tokens == self.token(":"), at, -1), axis=1)
        step = at - colon - 1
        people = jnp.arange(self.most_people)
        places = jnp.clip(line[:, :, None] + 2 * (1 + people), 0, tokens.shape[1] - 1)
        roles = jnp.take_along_axis(tokens[:, :, None], places, 1) == self.token("knight")
        said = truths(facts.statements[:, None], roles)
        fits = said == roles
        there = people < facts.num_people[:, None, None]
        in_line = thought & (line >= 0) & (colon == line + 2 * facts.num_people[:, None] + 1)

        def of_person(values: jax.Array, person: jax.Array) -> jax.Array:
            places = jnp.clip(person, 0, self.most_people - 1)[:, :, None]
            return jnp.take_along_axis(values, places, -1)[..., 0]

        everyone = facts.num_people[:, None]
        truth_is_right = (of_person(said, step) == true) & (step < everyone)
        ended = (step >= 1) & (step <= everyone)
        no_is_right = ~of_person(fits, step - 1) & ended
        yes_is_right = jnp.all(fits | ~there, -1) & (step == everyone)
        right = jnp.select(
            [true | false, no, yes], [truth_is_right, no_is_right, yes_is_right], False
        )
        steps = (true | false | no | yes) & thought
        number = jnp.sum(steps, -1)
        return jnp.sum(right & in_line & steps, -1) / jnp.maximum(number, 1)


def _ahead(values: jax.Array, steps: int) -> jax.Array:
    """What stands `steps` tokens further on, [answers, time]; -1 or False behind the end."""
    fill = False if values.dtype == bool else -1
    return jnp.pad(values[:, steps:], ((0, 0), (0, steps)), constant_values=fill)
