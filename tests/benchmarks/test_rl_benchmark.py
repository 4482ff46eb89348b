"""The benchmarks of agents, on a probe: what they run and report, not how long it takes."""

import json
import sys

import pytest

from benchmarks import rl_run, rl_throughput

TINY = ["--environment", "probe:action", "--steps", "2560", "--num-envs", "8", "--repeat", "2"]
FIELDS = ["--set", "num_steps=16", "hidden=(4,)", "learning_rate=0.1", "anneal_learning_rate=False"]


@pytest.mark.slow
def test_a_training_tells_speed_and_returns(capsys):
    """The line has what the peers' scripts have."""
    rl_run.main([*TINY, "--num-seeds", "2", "--target", "0.9", *FIELDS])
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2560
    assert len(found["seconds"]) == len(found["steps_per_second"]) == 2
    speed = 2 * 2560 / found["seconds"][0]  # of both seeds together
    assert found["steps_per_second"][0] == pytest.approx(speed)
    assert min(found["final_returns"]) > 0.5  # chance is 0
    assert found["returns"][-1][0] == 2560
    assert 0 < found["seconds_to_target"] < 60
    assert found["seen"][-1] >= 0.9 > max(found["seen"][:-1], default=0)


def test_ratios_are_taken_within_a_turn():
    """The machine's speed may drift between turns."""

    def numbers(speed):
        return {"steps_per_second": [speed], "compile_seconds": 1, "returns": [], "versions": {}}

    found = {"ours": [numbers(300), numbers(30)], "peer": [numbers(100), numbers(10)]}
    rows = rl_throughput.rows(found)
    assert rows["peer"]["first_over_this"] == pytest.approx(3)
    assert rows["ours"]["steps_per_second"] == 165


def test_a_program_that_fails_is_reported():
    with pytest.raises(RuntimeError, match=r"no such thing"):
        rl_throughput.run([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_refused(tmp_path):
    with pytest.raises(SystemExit):
        rl_throughput.main(["--out", str(tmp_path / "x"), "--rounds", "0"])
