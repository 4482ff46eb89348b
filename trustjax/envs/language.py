"""What a language model is trained on by rewards: prompts, and a function that scores answers.

A reward is a function of arrays, `reward(facts, tokens, mask) -> Rewards`, which runs within the
compiled training. `host_reward` makes one of any Python function of texts, which the training then
calls on the host.
"""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError, check_choice, check_number

PyTree = Any


def check_padded_left(name: str, mask: jax.Array) -> None:
    """Raises FieldError unless each row of a mask [rows, time] is True up to its end.

    A traced mask passes.
    """
    if isinstance(mask, jax.core.Tracer):
        return
    given = np.asarray(mask) != 0
    wrong = ~given[:, -1] | np.any(given[:, :-1] & ~given[:, 1:], 1)
    if wrong.any():
        must = "be True from the first token to the last of a row"
        row = f"row {int(np.argmax(wrong))}"
        raise FieldError(name, must, row, advice="pad on the left")


class Prompts(NamedTuple):
    """Prompts, and what the reward must know of each.

    Attributes:
      tokens: Tokens, int32 [prompts, time], padded on the left.
      mask: True on the tokens of the prompts, bool [prompts, time].
      facts: Arrays with a leading axis of prompts, such as the right answers; () for none.
    """

    tokens: jax.Array
    mask: jax.Array
    facts: PyTree = ()

    def check(self) -> None:
        """Raises ValueError, which names the field, for shapes that do not fit."""
        shape = np.shape(self.tokens)
        if len(shape) != 2 or 0 in shape:
            raise FieldError("prompts.tokens", "be an array [prompts, time]", f"shape {shape}")
        if np.shape(self.mask) != shape:
            raise FieldError(
                "prompts.mask", f"have the shape of the tokens, {shape}", np.shape(self.mask)
            )
        check_padded_left("prompts.mask", self.mask)
        for leaf in jax.tree.leaves(self.facts):
            if np.ndim(leaf) == 0 or len(leaf) != shape[0]:
                got = f"shape {np.shape(leaf)}"
                raise FieldError("prompts.facts", f"have a first axis of {shape[0]} prompts", got)

    def take(self, rows: jax.Array) -> "Prompts":
        """The prompts with these indices, int [...]."""
        taken: Prompts = jax.tree.map(lambda x: jnp.take(jnp.asarray(x), rows, 0), self)
        return taken


class Rewards(NamedTuple):
    """What a reward says of answers, all [answers].

    Attributes:
      reward: Rewards, float32; methods with advantages learn from them.
      level: Levels from 1, right, to 4, int32; methods with preferences learn from them. An answer
        counts as right in accuracies if its level is 1.
      thinking: Rewards of the reasoning in [0, 1], float32, for Trust-GRPO; 0 where there are none.
      seconds: Time on the host that the answer took, float32; 0 for rewards in JAX.
    """

    reward: jax.Array
    level: jax.Array
    thinking: jax.Array
    seconds: jax.Array


RewardFn = Callable[[PyTree, jax.Array, jax.Array], Rewards]


def rewards_of(
    reward: jax.Array, level: jax.Array | None = None, thinking: jax.Array | None = None
) -> Rewards:
    """`Rewards` of what is at hand; without levels, rewards >= 1 are right and others wrong.

    >>> rewards_of(jnp.array([1.0, 0.0])).level.tolist()
    [1, 2]
    """
    reward = jnp.asarray(reward, jnp.float32)
    level = jnp.where(reward >= 1, 1, 2) if level is None else level
    thinking = jnp.zeros_like(reward) if thinking is None else thinking
    level, thinking = jnp.asarray(level, jnp.int32), jnp.asarray(thinking, jnp.float32)
    return Rewards(reward, level, thinking, jnp.zeros_like(reward))


def corrupted_judge(
    reward: RewardFn,
    share: float,
    *,
    kind: Literal["inverted", "hacked"] = "inverted",
    seed: int = 0,
) -> RewardFn:
    """A reward whose judge of the reasoning errs on a share of the answers.

    It errs on the same answers every time: whether it does depends on the tokens of the answer and
    on the seed. Rewards and levels stay as they are, as rules need no judge.

    Args:
      reward: The reward, with thinking rewards in [0, 1].
      share: Share of the answers that are judged wrongly, in [0, 1].
      kind: What the judge says of them: "inverted" 1 minus the true thinking reward, or "hacked" 1
        for a wrong answer, whose reasoning has talked the judge round, and the truth for a right
        one.
      seed: Seed of the choice of answers.

    Raises:
      ValueError: `share` is out of range, or the kind is unknown.

    >>> def reward(facts, tokens, mask):
    ...     return rewards_of(jnp.zeros(len(tokens)), thinking=jnp.full(len(tokens), 0.25))
    >>> judged = corrupted_judge(reward, 1.0)
    >>> judged((), jnp.array([[3, 4]]), jnp.ones((1, 2), bool)).thinking.tolist()
    [0.75]
    """
    check_number("share", share, at_least=0.0, at_most=1.0)
    check_choice("kind", kind, ("inverted", "hacked"))

    def judged(facts: PyTree, tokens: jax.Array, mask: jax.Array) -> Rewards:
        found = reward(facts, tokens, mask)
        key = jax.random.key(seed)
        # A hash of the whole answer: odd factors, so that no token is lost modulo 2^32.
        factors = jax.random.bits(key, tokens.shape[-1:], jnp.uint32) | 1
        hashes = jnp.sum(jnp.where(mask != 0, tokens + 1, 0).astype(jnp.uint32) * factors, -1)
        drawn = jax.vmap(lambda x: jax.random.uniform(jax.random.fold_in(key, x)))(hashes)
        hacked = jnp.where(found.level == 1, found.thinking, 1.0)
        wrong = hacked if kind == "hacked" else 1.0 - found.thinking
        return found._replace(thinking=jnp.where(drawn < share, wrong, found.thinking))

    return judged


class RewardError(ValueError):
    """A function of the user that failed on an answer, or returned what is no reward."""


def host_reward(
    function: Callable[[Any, str], Any],
    decode: Callable[[npt.NDArray[np.int32]], str],
    *,
    correct_from: float = 1.0,
) -> RewardFn:
    """A reward that calls a Python function on the text of every answer.

    The device waits for it. As JAX demands of what it calls, the function should depend on nothing
    but its arguments. An exception of the function, and a reward that is not finite, end the
    training; the message names the sample (its number within the batch that is scored) and has the
    beginning of its text.

    Args:
      function: Function `function(facts, text)` of the facts of the prompt, as NumPy arrays, and
        the text of the answer. It returns the reward, a number, or the pair (level, reward).
      decode: Function of the tokens of an answer that returns its text, such as
        `Tokenizer.decode`.
      correct_from: Rewards from here on are of level 1 and others of level 2, if the function
        returns no levels.

    >>> reward = host_reward(lambda facts, text: len(text), lambda tokens: "x" * len(tokens))
    >>> tokens, mask = jnp.zeros((2, 3), int), jnp.array([[1, 0, 0], [1, 1, 0]], bool)
    >>> reward((), tokens, mask).reward.tolist()
    [1.0, 2.0]
    """
    check_number("correct_from", correct_from)

    def one(index: int, facts: Any, tokens: npt.NDArray[np.int32]) -> tuple[float, int, float]:
        started = time.perf_counter()
        text = decode(tokens)
        try:
            found = function(facts, text)
            level, value = found if isinstance(found, tuple) else (None, found)
            value = float(value)
            level = (1 if value >= correct_from else 2) if level is None else int(level)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RewardError(
                f"reward of sample {index} failed: {what}; its text is {text!r:.200}"
            ) from error
        if not np.isfinite(value) or not 1 <= level <= 4:
            got = f"level {level}, reward {value}"
            raise RewardError(
                f"reward of sample {index} must be finite, with a level from 1 to 4, got {got}; "
                f"its text is {text!r:.200}"
            )
        return value, level, time.perf_counter() - started

    def all_of_them(facts: Any, tokens: Any, mask: Any) -> tuple[Any, Any, Any]:
        # NumPy throughout: a callback that waits for JAX may wait for itself.
        facts, tokens, mask = jax.tree.map(np.asarray, (facts, tokens, mask))
        rows = [
            one(index, jax.tree.map(lambda x: x[index], facts), row[kept])  # noqa: B023
            for index, (row, kept) in enumerate(zip(tokens, mask, strict=True))
        ]
        value, level, seconds = (np.array(column) for column in zip(*rows, strict=True))
        return value.astype(np.float32), level.astype(np.int32), seconds.astype(np.float32)

    def reward(facts: PyTree, tokens: jax.Array, mask: jax.Array) -> Rewards:
        shape = (len(tokens),)
        kinds = (jnp.float32, jnp.int32, jnp.float32)
        results = tuple(jax.ShapeDtypeStruct(shape, kind) for kind in kinds)
        # One lane of `jax.vmap` after the other: texts gain nothing from a batch.
        value, level, seconds = jax.pure_callback(
            all_of_them, results, facts, tokens, mask != 0, vmap_method="sequential"
        )
        return Rewards(value, level, jnp.zeros(shape, jnp.float32), seconds)

    return reward
