"""The benchmark of losses runs, compares values, and does without peers that are not there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sequence_losses
from benchmarks.sequence_loss_rows import arrays


class Peer:
    """Says that every program takes a second, and that TRL has DPO's value."""

    def __init__(self, value):
        self.about = {"results": {"trl/dpo_sigmoid": value}}

    def run(self, name):
        assert name == "trl/dpo_sigmoid"
        return 1.0


def dpo(given):
    """The value and the norm of the gradient by the formula."""
    margin = given["reference_chosen"] - given["reference_rejected"]
    loss = lambda x: -jnp.mean(jax.nn.log_sigmoid(0.1 * (x[0] - x[1] - margin)))
    value, slope = jax.value_and_grad(loss)(jnp.stack([given["chosen"], given["rejected"]]))
    return {"value": float(value), "norm": float(jnp.linalg.norm(slope))}


def test_ratios_and_values(capsys):
    given = arrays(batch=8, time=4, pairs=6)
    right = dpo(given)
    rows = sequence_losses.measure(["dpo_sigmoid"], given, Peer(right), repeats=2)
    ratio = rows["dpo_sigmoid"]["ratio"]
    assert ratio.keys() == {"ours", "ours, with metrics"}
    assert ratio["ours"].keys() == {"trl"}  # no formula by hand there
    ours = rows["dpo_sigmoid"]["milliseconds"]["ours"]["median"]
    np.testing.assert_allclose(ratio["ours"]["trl"]["median"], ours / 1000)
    assert "ours / trl" in capsys.readouterr().out
    for kind in right:
        wrong = right | {kind: 2 * right[kind] + 1}
        with pytest.raises(RuntimeError, match=f"trl/dpo_sigmoid: {kind} is"):
            sequence_losses.measure(["dpo_sigmoid"], given, Peer(wrong), repeats=1)


def test_without_peers(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out.json"), "--peers", str(tmp_path), "--repeats", "1"]
    sequence_losses.main([*arguments, "--only", "advantages_rloo"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert "build.sh" in found["peer"]["missing"]["torch"]
    assert found["rows"]["advantages_rloo"]["ratio"] == {"ours": {}}
    assert "without torch" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sequence_losses.main([*arguments, "--repeats", "0"])
