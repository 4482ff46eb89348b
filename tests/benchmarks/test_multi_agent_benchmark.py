"""The benchmark of several agents, tiny: what it runs and reports, not how long it takes."""

import functools
import json

import pytest

from benchmarks import multi_agent


@pytest.mark.slow
def test_what_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(multi_agent, "COUNTS", (2,))
    monkeypatch.setattr(multi_agent, "SPREAD", multi_agent.STATIONS)  # needs no JaxMARL
    two = {name: multi_agent.AGENTS[name] for name in ("mappo", "happo")}
    monkeypatch.setattr(multi_agent, "AGENTS", two)
    monkeypatch.setattr(multi_agent, "SAME_ROLLOUT", {"num_steps": 100, "hidden": (4,)})
    out = tmp_path / "numbers.json"
    options = ["--out", str(out), "--rounds", "2", "--only", "environments", "trust"]
    multi_agent.main(options)
    found = json.loads(out.read_text())
    assert len(found["environments"][multi_agent.STATIONS]["2"]["each"]) == 2
    assert found["trust"]["mappo"]["time_over_first"] == 1
    assert all(len(each["seconds"]) == 2 for each in found["trust"].values())
    assert "steps/s" in capsys.readouterr().out


def test_ratios_are_taken_within_a_turn():
    """The machine's speed may drift between turns; the first two calls do not count."""
    drift = {"a": iter([9.0, 9.0, 1.0, 10.0]), "b": iter([9.0, 9.0, 2.0, 20.0])}
    programs = {name: functools.partial(next, own) for name, own in drift.items()}
    found = multi_agent.turns(programs, 30, rounds=2)
    assert found["b"]["time_over_first"] == 2
    assert found["a"]["seconds"] == [1, 10]
    assert found["a"]["steps_per_second"] == pytest.approx(30 / 5.5)


def test_refused(tmp_path):
    with pytest.raises(SystemExit):
        multi_agent.main(["--out", str(tmp_path / "x"), "--rounds", "0"])
