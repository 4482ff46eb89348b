"""Optimizers as configuration: factories `learning_rate -> optax.GradientTransformation`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

Mask = Callable[[Any], Any]


@dataclass(frozen=True)
class Optimizer:
    """An Optax optimizer whose learning rate is still open, alone or behind an attack.

    Attributes:
      base: `learning_rate -> GradientTransformation`, such as a partial `optax.adamw`.
      attack: a transform that stands before it, such as a partial `trustjax.optim.sam`.
      radius: the keyword arguments of `attack` that set how far it reaches ({"rho": 0.05}). They
        stand apart so that a search can vary them as traced numbers.
    """

    base: Callable[..., optax.GradientTransformation]
    attack: Callable[..., optax.GradientTransformation] | None = None
    radius: Mapping[str, float] = field(default_factory=dict)

    def __call__(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        trainable: Mask | None = None,
        **radius: jax.typing.ArrayLike,
    ) -> optax.GradientTransformation:
        """The optimizer at this rate; `radius` replaces entries of the attribute.

        `trainable` maps parameters to a tree of bools. Those with False are neither attacked nor
        changed, and have no state.
        """
        base = self.base(learning_rate)
        masked = {}
        if trainable is not None:
            base = optax.partition({True: base, False: optax.set_to_zero()}, trainable)
            masked = {"mask": trainable}
        if self.attack is None:
            return base
        return optax.chain(self.attack(**{**self.radius, **radius, **masked}), base)


@dataclass(frozen=True)
class Method:
    """One row of a comparison: an optimizer and its learning rate.

    Attributes:
      optimizer: the factory.
      learning_rate: peak learning rate, > 0.
    """

    optimizer: Optimizer
    learning_rate: float

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
