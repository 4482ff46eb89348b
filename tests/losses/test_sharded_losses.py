"""Every loss that counts over devices: eight devices equal one, with gradients taken inside.

Inside `jax.shard_map` a training step takes the gradient on each device, of its own rows and of
weights that all devices share. Both are those of one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_group import LOSSES

from trustjax.losses import (
    cpo_loss,
    cr_dpo_loss,
    dpo_loss,
    kto_loss,
    masked_mean,
    nll_loss,
    orpo_loss,
    reduce_tokens,
    trpa_loss,
    trpa_trust_region,
)

ROWS, TIME = 16, 5
RANDOM = np.random.default_rng(0)
OLD, REFERENCE = RANDOM.normal(-2, 1, (2, ROWS, TIME))
MASK = RANDOM.random((ROWS, TIME)) < 0.6
MASK[3] = False
ADVANTAGES = RANDOM.normal(size=ROWS)
LEVELS, GROUPS = RANDOM.integers(1, 4, ROWS), RANDOM.integers(0, 4, ROWS)
LENGTHS = RANDOM.integers(1, 20, ROWS)
GIVEN = {
    "old": OLD, "reference": REFERENCE, "mask": MASK, "advantages": ADVANTAGES, "levels": LEVELS,
    "groups": GROUPS, "lengths": LENGTHS, "where": RANDOM.random(ROWS) > 0.3,
}  # fmt: skip


def of_tokens(loss, **options):
    def total(new, given, axis):
        return loss(
            new, given["old"], given["advantages"], given["mask"], axis_name=axis, **options
        )

    return total


def with_reference(loss, **options):
    def total(new, given, axis):
        old, mask = given["old"], given["mask"]
        return loss(
            new, old, given["advantages"], mask, reference_log_probs=given["reference"], beta=0.1,
            weights=given["lengths"] / 10, axis_name=axis, **options,
        )  # fmt: skip

    return total


def of_pairs(loss):
    """The mean of the losses of pairs, for sums over the first and over the last tokens."""

    def total(new, given, axis):
        losses = loss(new[:, :2].sum(-1), new[:, 2:].sum(-1), given, axis)
        where = given["where"]
        sums = jnp.sum(jnp.where(where, losses, 0)), jnp.sum(where)
        if axis is not None:
            sums = jax.lax.psum(sums, axis)
        return sums[0] / sums[1]

    return total


def trpa(new, given, axis, **options):
    return trpa_loss(
        new, given["old"], given["reference"], given["levels"], given["groups"], given["mask"],
        trust_coefficient=0.2, axis_name=axis, **options,
    )  # fmt: skip


def pair_options(given, axis):
    return {"where": given["where"], "axis_name": axis}


TOTALS = {
    **{name: of_tokens(loss) for name, loss in LOSSES.items()},
    **{
        f"grpo_{reduction}": with_reference(LOSSES["grpo"], reduction=reduction)
        for reduction in ("token_mean", "sequence_mean", "sequence_sum", "constant")
    },
    **{
        f"reduce_{reduction}": lambda new, given, axis, reduction=reduction: reduce_tokens(
            new, given["mask"], reduction=reduction, axis_name=axis
        )
        for reduction in ("token_mean", "sequence_mean", "sequence_sum", "constant")
    },
    "masked_mean": lambda new, given, axis: masked_mean(new, given["mask"], axis_name=axis),
    "trpa": trpa,
    "trpa_prompt": functools.partial(trpa, reduction="prompt"),
    "trpa_trust_region": lambda new, given, axis: trpa_trust_region(
        new, given["old"], given["mask"], trust_region="root", axis_name=axis
    ),
    **{
        variant: of_pairs(
            lambda chosen, rejected, given, axis, variant=variant: dpo_loss(
                chosen, rejected, given["old"][:, 0], given["old"][:, 1], beta=0.3,
                variant=variant, label_smoothing=0.1, **pair_options(given, axis),
            )
        )
        for variant in ("aot", "aot_unpaired")
    },
    "nll": of_pairs(
        lambda chosen, _, given, axis: nll_loss(
            chosen, given["lengths"], **pair_options(given, axis)
        )
    ),
    "cpo": of_pairs(
        lambda chosen, rejected, given, axis: cpo_loss(
            chosen, rejected, chosen_lengths=given["lengths"], **pair_options(given, axis)
        )
    ),
    "orpo": of_pairs(
        lambda chosen, rejected, given, axis: orpo_loss(
            -jnp.square(chosen) - 1, -jnp.square(rejected) - 1, chosen_lengths=given["lengths"],
            rejected_lengths=given["lengths"], **pair_options(given, axis),
        )
    ),
    "cr_dpo": of_pairs(
        lambda chosen, rejected, given, axis: cr_dpo_loss(
            chosen, rejected, given["old"][:, 0], given["old"][:, 1], given["lengths"], beta=0.3,
            **pair_options(given, axis),
        )
    ),
    "kto": of_pairs(
        lambda policy, other, given, axis: kto_loss(
            policy, given["old"][:, 0], given["levels"] > 2, other, given["old"][:, 1],
            **pair_options(given, axis),
        )
    ),
}  # fmt: skip


@pytest.mark.table
@pytest.mark.parametrize("name", TOTALS)
def test_eight_devices_equal_one(name, x64):
    def step(scale, shift, given, axis=None):
        """The loss, its gradient by a weight that all share, and that by what each row has."""
        loss = lambda scale, shift: TOTALS[name](scale * given["old"] + shift, given, axis)
        return jax.value_and_grad(loss, (0, 1))(scale, shift)

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    many = jax.shard_map(
        functools.partial(step, axis="d"),
        mesh=mesh,
        in_specs=(P(), P("d"), P("d")),
        out_specs=(P(), (P(), P("d"))),
    )
    start = (np.float64(0.9), RANDOM.normal(0, 0.1, (ROWS, TIME)), GIVEN)
    one, several = jax.jit(step)(*start), jax.jit(many)(*start)
    for found, expected in zip(jax.tree.leaves(several), jax.tree.leaves(one), strict=True):
        assert np.any(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
