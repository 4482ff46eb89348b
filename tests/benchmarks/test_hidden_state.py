"""The benchmark of hidden states finds those that are known."""

import json

import pytest

from benchmarks import hidden_state


@pytest.mark.slow
def test_springs_hide_a_state_that_joint_coordinates_do_not(tmp_path, capsys):
    """Fails if the state is not built anew."""
    out = tmp_path / "out.json"
    hidden_state.main([
        "--out", str(out), "--task", "inverted_pendulum", "--backend", "spring", "generalized",
        "--states", "8",
    ])  # fmt: skip
    found = json.loads(out.read_text())["gap"]["inverted_pendulum"]
    assert found["generalized"] < 1e-3
    assert found["spring"] > 0.1
    assert "inverted_pendulum, spring: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        hidden_state.main(["--out", str(out), "--states", "0"])
