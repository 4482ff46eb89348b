"""The search of rates, where some of its trials diverge."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from experiments import run
from experiments.runtime.building import build
from experiments.runtime.config import check_config
from experiments.runtime.overrides import composed
from experiments.runtime.targets import ConfigError
from experiments.runtime.task import Diverged
from experiments.trackers import Row, read_rows

TINY = (
    "+exp=auon_vision_search",
    "task.only=[adamw]",
    "~task.grid.auon",
    "model=mlp",
    "model.hidden=[4]",
    "num_seeds=2",
    "task.train_examples=40",
    "task.validation_examples=40",
    "task.max_test_examples=40",
    "task.steps=4",
    "task.steps_per_chunk=2",
    "task.batch_size=20",
    "tracker=csv",
    "hydra.run.dir=.",
)


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of the process stay as they were."""
    for name in ("HYDRA_FULL_ERROR", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "1")
    yield
    jax.config.update("jax_enable_x64", False)


def search(folder: Path, rates: str) -> int:
    """The exit code of a search over these learning rates."""
    folder.mkdir()
    grid = f"task.grid={{adamw:{{learning_rate:{rates}}}}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["run", *TINY, grid])
        try:
            run.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def lanes(folder: Path, rate: float) -> list[Row]:
    """The rows of one trial, without times."""
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in read_rows(folder / "metrics.csv")
        if row["learning_rate"] == rate
    ]


@pytest.mark.slow
def test_a_diverged_candidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are as beside one that did not, it is called diverged, and is never the best."""
    assert search(tmp_path / "calm", "[1e-3,2e-3]") == 0
    assert search(tmp_path / "wild", "[1e30,2e-3]") == 0
    assert capsys.readouterr().err == ""
    others = lanes(tmp_path / "wild", 2e-3)
    assert len(others) == 2 * 3
    assert others == lanes(tmp_path / "calm", 2e-3)
    diverged = lanes(tmp_path / "wild", 1e30)
    assert len(diverged) == 2 * 3
    assert {row.get("diverged") for row in diverged[2:]} == {1}
    assert not any("final/accuracy" in row for row in diverged)
    result = json.loads((tmp_path / "wild" / "summary.json").read_text())["result"]
    assert result["best"]["adamw"]["learning_rate"] == 2e-3
    wild, calm = result["trials"]["adamw"]
    assert wild == {"learning_rate": 1e30, "diverged": True}
    assert set(calm) == {"learning_rate", "accuracy", "loss"}


@pytest.mark.parametrize(
    ("exp", "target"),
    [
        ("auon_vision_search", "experiments.tasks.from_scratch_search.FromScratchSearch"),
        ("tram_vision_search", "experiments.tasks.adaptation_search.AdaptationSearch"),
    ],
)
def test_searches_keep_their_earlier_addresses(exp: str, target: str) -> None:
    """They stand in config.yaml of earlier runs, which can still be continued."""
    config = check_config(composed([f"+exp={exp}", f"task._target_={target}", "model=mlp"]))
    now = build(check_config(composed([f"+exp={exp}", "model=mlp"]))["task"], "task")
    earlier = build(config["task"], "task")
    earlier.validate()
    assert isinstance(earlier, type(now))
    name = "adamw"
    assert earlier.search.trials(name) == now.search.trials(name)
    del config["task"]["grid"]
    with pytest.raises(ConfigError, match="grid"):
        check_config(config)


def test_rates_of_many_digits_are_found_again(tmp_path: Path) -> None:
    """metrics.csv holds six of them."""
    assert search(tmp_path / "run", "[0.00123456789,1e30]") == 0
    result = json.loads((tmp_path / "run" / "summary.json").read_text())["result"]
    assert result["best"]["adamw"]["learning_rate"] == 0.00123456789
    assert result["best"]["adamw"]["accuracy"] > 0


def test_all_trials_diverge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(tmp_path / "run", "[1e30,2e30]") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: stage adamw: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "summary.json").exists()


def test_in_every_candidate_a_seed_diverges(tmp_path: Path) -> None:
    """No lane is the best; one seed alone would be taken for all."""
    config = check_config(composed([*TINY, "task.grid={adamw:{learning_rate:[1e-3,2e-3]}}"]))
    task = build(config["task"], "task")
    measured = {"final/accuracy": 0.5, "final/loss": 1.0}
    row = {"stage": "adamw", "step": 4}
    rows: list[Row] = [
        {**row, "seed": 0, **measured, "learning_rate": 1e-3},
        {**row, "seed": 1, "diverged": 1, "learning_rate": 1e-3},
        {**row, "seed": 0, "diverged": 1, "learning_rate": 2e-3},
        {**row, "seed": 1, **measured, "learning_rate": 2e-3},
    ]
    with pytest.raises(Diverged, match="adamw: of every trial a seed diverged"):
        task.summarize(rows)
    rows[1] = {**row, "seed": 1, **measured, "learning_rate": 1e-3}
    assert task.summarize(rows).values["best"]["adamw"]["learning_rate"] == 1e-3
