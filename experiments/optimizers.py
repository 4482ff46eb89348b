"""Methods as configuration: an optimizer whose learning rate is open, that rate, a penalty."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import optax

from experiments.penalties import Penalty
from trustjax.optim import matrix_labels

Mask = Callable[[Any], Any]


@dataclass(frozen=True)
class Optimizer:
    """An Optax optimizer whose learning rate is still open, alone or behind an attack.

    Attributes:
      base: `learning_rate -> GradientTransformation`, such as a partial `optax.adamw`.
      rates: further keyword arguments of `base` ({"ratio": 0.1}), which a search may vary.
      attack: a transform that stands before it, such as a partial `trustjax.optim.sam`.
      radius: the keyword arguments of `attack` that set how far it reaches ({"rho": 0.05}), which
        a search may vary.
    """

    base: Callable[..., optax.GradientTransformation]
    attack: Callable[..., optax.GradientTransformation] | None = None
    radius: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)

    def __call__(
        self, learning_rate: optax.ScalarOrSchedule, *, trainable: Mask | None = None
    ) -> optax.GradientTransformation:
        """The optimizer at this rate.

        `trainable` maps parameters to a tree of bools. Those with False are neither attacked nor
        changed, and have no state.
        """
        base = self.base(learning_rate, **self.rates)
        masked = {}
        if trainable is not None:
            base = optax.partition({True: base, False: optax.set_to_zero()}, trainable)
            masked = {"mask": trainable}
        if self.attack is None:
            return base
        return optax.chain(self.attack(**self.radius, **masked), base)


@dataclass(frozen=True)
class Method:
    """One row of a comparison: an optimizer, its learning rate, and what is added to the loss.

    Attributes:
      optimizer: the factory.
      learning_rate: peak learning rate, > 0.
      penalty: a term of the loss, or None.
    """

    optimizer: Optimizer
    learning_rate: float
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")

    @property
    def numbers(self) -> dict[str, float]:
        """What a search may vary beside the rate: other rates, the radius, the penalty's weight."""
        weight = {} if self.penalty is None else {"weight": self.penalty.weight}
        return {**self.optimizer.rates, **self.optimizer.radius, **weight}

    def at(self, **numbers: jax.typing.ArrayLike) -> "Method":
        """The method with other values of its `numbers`, all of them; they may be traced."""
        rates, radius = (
            {name: numbers[name] for name in own}
            for own in (self.optimizer.rates, self.optimizer.radius)
        )
        penalty = self.penalty and replace(self.penalty, weight=numbers["weight"])
        optimizer = replace(self.optimizer, rates=rates, radius=radius)
        return replace(self, optimizer=optimizer, penalty=penalty)


def matrices_and_others(
    learning_rate: optax.ScalarOrSchedule,
    *,
    direction: optax.GradientTransformation,
    ratio: jax.typing.ArrayLike = 0.1,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """An optimizer whose matrices follow `direction`, and whose other leaves follow AdamW.

    So methods for matrices are compared on the same leaves, `trustjax.optim.matrix_labels`.

    Args:
      learning_rate: of the matrices; a number or a schedule.
      direction: turns the gradients of matrices into updates before the rate.
      ratio: AdamW's rate in units of `learning_rate`; may be traced.
      weight_decay: decoupled, in units of the rate of the leaf.
    """

    def of_others(count: jax.Array) -> jax.typing.ArrayLike:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return ratio * rate

    matrices = optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(of_others, weight_decay=weight_decay)
    return optax.partition({"auon": matrices, "other": others}, matrix_labels)
