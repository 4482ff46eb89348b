"""Optimizers for matrices, compared on the same leaves and with the same AdamW for the others."""

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

    `trustjax.optim.matrix_labels` decides which leaves are matrices.

    Args:
      learning_rate: Learning rate of the matrices; a number or a schedule.
      direction: Transform from gradients of matrices to updates without the learning rate.
      ratio: AdamW's learning rate in units of `learning_rate`; may be traced.
      weight_decay: Decoupled weight decay, in units of the leaf's learning rate.
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
    """Muon's update of matrices of two axes, without the learning rate.

    Args:
      matched: Whether the update is scaled to Frobenius norm 1, as AuON's is, so that one learning
        rate gives both the same root mean square; otherwise it has Muon's factor
        sqrt(max(1, fan_out / fan_in)).
    """

    def all_plain(updates: Any) -> Any:
        return jax.tree.map(lambda _: MuonDimensionNumbers(), updates)

    def with_shape_factor(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u: u * math.sqrt(max(1, u.shape[1] / u.shape[0])), updates)

    # Without momentum and brake, AuON only divides by the norm.
    norm_one = scale_by_auon(0.0, nesterov=False, gamma=0.0)
    return optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=all_plain),
        norm_one if matched else optax.stateless(with_shape_factor),
    )
