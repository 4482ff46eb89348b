"""The benchmark of the optimizers, on tiny networks: what it counts, not how long it takes."""

import itertools
import json
import re

import jax
import numpy as np
import optax
import pytest

from benchmarks import optimizers
from benchmarks.optimizers import OPTIMIZERS, PASSES, WORKLOADS, Workload, num_bytes
from trustjax.models import MLP

# So many examples that passes cost more than the attack and the update.
SMALL = Workload(MLP(10, (128, 128)), (8, 8, 1), 256, 2)


@pytest.fixture(scope="module")
def programs():
    return optimizers.programs_of(SMALL, OPTIMIZERS)


def test_every_optimizer_has_its_passes():
    assert PASSES.keys() == OPTIMIZERS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flops_of_a_compiled_step_are_those_of_its_passes(name, programs):
    """TRAM: three forward and two backward passes. One more would be 14 % or more."""
    flops = {name: program.flops for name, program in programs.items()}
    expected = optimizers.cost_of_passes(flops, PASSES[name])
    # The checks for numbers that are not finite cost up to 3.1 %.
    np.testing.assert_allclose(flops[name], expected, rtol=0.04)
    assert flops["forward"] > 0.12 * expected


@pytest.mark.slow
def test_memory_of_tram_is_one_copy_of_the_parameters_more(programs):
    params, state = programs["tram_previous"].carry
    for name in ("tram_noise", "sam"):
        assert num_bytes(state) - num_bytes(programs[name].carry[1]) == num_bytes(params)
    sizes = programs["tram_previous"].memory["arguments"], programs["sam"].memory["arguments"]
    assert sizes[0] - sizes[1] == pytest.approx(num_bytes(params), abs=100)
    assert programs["tram_previous"].memory["results"] < 1000  # state and parameters are donated


@pytest.mark.slow
def test_tram_overwrites_its_buffers_in_place(programs):
    """XLA makes no copies of the parameters or of the reference in order to keep them longer."""
    text = programs["tram_previous"].compiled.as_text()
    assert re.search(r"= f32\[128,128\]\S* fusion\(", text)
    assert not re.search(r"= f32\[128,128\]\S* copy\(", text)


@pytest.mark.slow
def test_the_peer_does_the_same(programs):
    """Optax's SAM hands the base optimizer the gradient that ours does."""
    moments = []
    for name in ("sam", "optax.contrib.sam", "adamw"):
        programs[name]()
        moments.append(optax.tree.get(programs[name].carry[1], "nu"))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-12)
    jax.tree.map(close, moments[0], moments[1])
    with pytest.raises(AssertionError):
        jax.tree.map(close, moments[0], moments[2])


def test_programs_take_turns():
    calls, clock = [], itertools.count(1)

    def program(name):
        def call():
            calls.append(name)
            return next(clock)

        return call

    seconds = optimizers.take_turns({"a": program("a"), "b": program("b")}, repeats=20)
    turns = [sorted(calls[i : i + 2]) for i in range(0, 44, 2)]
    assert turns == [["a", "b"]] * 22
    assert calls[4:44:2] != ["a"] * 20  # the order changes
    assert seconds["a"].min() > 4  # the first two calls do not count
    np.testing.assert_array_equal(np.sort([*seconds["a"], *seconds["b"]]), np.arange(5, 45))


@pytest.mark.parametrize(("factor", "met"), [(1.0, True), (1.06, False)])
def test_targets(factor, met):
    """F = 1, B = 2, O = 1: SAM may take 1.05 (2 + 4 + 1) / (1 + 2 + 1) of AdamW's time."""
    ideal = {"ratio": {"median": 7 / 4}}
    rows = {"sam": {"ratio": {"median": factor * 7 / 4}, "of_passes": ideal}}
    seconds = {"sam": np.array([1.0, factor, 9.0]), "peer": np.array([1.0, 1.0, 1.0])}
    to_passes = optimizers.reached(optimizers.Target("sam", 1.05), rows, seconds)
    assert to_passes["limit"] == pytest.approx(1.05 * 7 / 4)
    to_peer = optimizers.reached(optimizers.Target("sam", 1.03, "peer"), rows, seconds)
    assert to_peer["ratio"] == factor
    assert (to_passes["met"], to_peer["met"]) == (met, met)
    costs = {"forward": 1.0, "forward and backward": 3.0, "update": 1.0}
    assert optimizers.cost_of_passes(costs, PASSES["sam"]) == 7.0


@pytest.mark.slow
def test_command_line(monkeypatch, tmp_path, capsys):
    """On the transformer for GPUs without its blocks, which take long to compile."""
    model = WORKLOADS["vit_b16"].model.clone(width=16, depth=0, num_heads=2)
    tiny = Workload(model, (32, 32, 3), 2, repeats=40)
    few = {name: OPTIMIZERS[name] for name in ("adamw", "optax.contrib.sam", "sam")}
    monkeypatch.setitem(WORKLOADS, "vit_b16", tiny)
    monkeypatch.setattr(optimizers, "OPTIMIZERS", few)
    out = tmp_path / "numbers.json"
    optimizers.main(["--out", str(out), "--model", "vit_b16", "--repeats", "2"])
    numbers = json.loads(out.read_text())
    assert {"jax", "optax"} <= numbers["versions"].keys()
    assert numbers["device"]
    found = numbers["models"]["vit_b16"]
    assert (found["dtype"], found["repeats"], found["batch"]) == ("bfloat16", 2, [2, 32, 32, 3])
    assert found["rows"].keys() == few.keys()
    assert found["rows"]["adamw"]["ratio"]["median"] == 1.0
    assert all(row["milliseconds"]["low"] > 0 for row in found["rows"].values())
    assert [(target["row"], target["to"]) for target in found["targets"]] == [
        ("sam", "adamw"),
        ("sam", "optax.contrib.sam"),
    ]
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in few)
    with pytest.raises(SystemExit):
        optimizers.main(["--out", str(out), "--repeats", "0"])
