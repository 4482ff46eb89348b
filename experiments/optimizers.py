"""Methods as configuration: an optimizer whose learning rate is still open, the rate, a penalty."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import optax

from experiments.penalties import Penalty
from trustjax._checks import FieldError

Mask = Callable[[Any], Any]


@dataclass(frozen=True)
class Optimizer:
    """An Optax optimizer whose learning rate is still open, alone or behind an attack.

    Attributes:
      base: Function `learning_rate -> GradientTransformation`, such as `optax.adamw`.
      attack: Makes a transform that stands before the optimizer, such as `trustjax.optim.sam`; None
        for the optimizer alone.
      radius: Keyword arguments of `attack` that set its reach, such as {"rho": 0.05}; a search may
        vary them.
      rates: Further keyword arguments of `base`, such as {"ratio": 0.1}; a search may vary them.
    """

    base: Callable[..., optax.GradientTransformation]
    attack: Callable[..., optax.GradientTransformation] | None = None
    radius: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.attack is None and self.radius:
            raise FieldError("radius", "be empty without an attack", dict(self.radius))

    def __call__(
        self, learning_rate: optax.ScalarOrSchedule, *, trainable: Mask | None = None
    ) -> optax.GradientTransformation:
        """The optimizer at this rate.

        `trainable` maps the parameters to a tree of bools. Parameters with False are neither
        attacked nor changed, and have no state.
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
    """One row of a comparison: an optimizer, its learning rate, and a penalty.

    Attributes:
      optimizer: Optimizer whose learning rate is still open.
      learning_rate: Peak learning rate, > 0.
      penalty: Term that is added to the loss; None for the loss alone.
    """

    optimizer: Optimizer
    learning_rate: float
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise FieldError("learning_rate", "be > 0", self.learning_rate)

    @property
    def hyperparameters(self) -> dict[str, float]:
        """What a search may vary beside the learning rate: rates, radius, the penalty's weight."""
        weight = {} if self.penalty is None else {"weight": self.penalty.weight}
        return {**self.optimizer.rates, **self.optimizer.radius, **weight}

    def at(self, **hyperparameters: Any) -> "Method":
        """The method with other values for all its `hyperparameters`, which may be traced."""
        rates, radius = (
            {name: hyperparameters[name] for name in own}
            for own in (self.optimizer.rates, self.optimizer.radius)
        )
        given: Any = self.penalty  # a dataclass, which a protocol cannot say
        penalty = given and replace(given, weight=hyperparameters["weight"])
        optimizer = replace(self.optimizer, rates=rates, radius=radius)
        return replace(self, optimizer=optimizer, penalty=penalty)
