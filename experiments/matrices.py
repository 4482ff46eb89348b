"""Optimizers for matrices, compared on the same leaves and beside the same AdamW."""

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from trustjax.optim import matrix_labels, scale_by_auon


def matrices_and_others(
    learning_rate: optax.ScalarOrSchedule,
    *,
    direction: optax.GradientTransformation,
    ratio: jax.typing.ArrayLike = 0.1,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """An optimizer whose matrices follow `direction`, and whose other leaves follow AdamW.

    Which leaves are matrices: `trustjax.optim.matrix_labels`.

    Args:
      learning_rate: of the matrices; a number or a schedule.
      direction: turns the gradients of matrices into updates before the rate.
      ratio: AdamW's rate in units of `learning_rate`; may be traced.
      weight_decay: decoupled, in units of the rate of the leaf.
    """

    def of_others(count: jax.Array) -> jax.typing.ArrayLike:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        scaled: jax.typing.ArrayLike = ratio * rate
        return scaled

    matrices = optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(of_others, weight_decay=weight_decay)
    return optax.partition({"auon": matrices, "other": others}, matrix_labels)


def muon_direction(*, matched: bool = False) -> optax.GradientTransformation:
    """Muon's update of matrices of two axes before the rate.

    Args:
      matched: with Frobenius norm 1, as AuON's has, so that one rate gives both the same root mean
        square; else with Muon's factor sqrt(max(1, fan_out / fan_in)).
    """

    def all_plain(updates: Any) -> Any:
        return jax.tree.map(lambda _: MuonDimensionNumbers(), updates)

    def with_shape_factor(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u: u * math.sqrt(max(1, u.shape[1] / u.shape[0])), updates)

    # Without momentum and brake AuON is the division by the norm.
    norm_one = scale_by_auon(0.0, nesterov=False, gamma=0.0)
    return optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=all_plain),
        norm_one if matched else optax.stateless(with_shape_factor),
    )
