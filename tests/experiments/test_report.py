"""Reports of run folders that are written here, not trained."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from experiments import report
from experiments.analysis import plots
from experiments.analysis.collection import Collection
from experiments.analysis.report_figures import plot_curves
from experiments.analysis.scores import score
from experiments.analysis.statistics import mean_interval
from experiments.runtime.targets import ConfigError
from experiments.trackers import Csv, Row

SAM = {"optimizer": {"attack": {"_target_": "trustjax.optim.sam", "rho": 0.05}}}
TRAM = {"optimizer": {"attack": {"_target_": "trustjax.optim.tram", "scale": 1.0}}}


def write_run(
    folder: Path,
    finals: Mapping[str, Sequence[float]],
    *,
    seed: int = 0,
    exp: str = "tiny",
    task: Mapping[str, Any] | None = None,
    num_steps: int = 2,
    metric: str = "accuracy",
    finished: bool = True,
) -> Path:
    """Writes a run with a stage for each of `finals`, whose values are those of the seeds."""
    folder.mkdir(parents=True)
    config = {"exp": exp, "seed": seed, "num_seeds": 9, "task": {"seed": seed, **(task or {})}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    tracker = Csv(folder / "metrics.csv")
    tracker.resume_from([])
    for stage, values in finals.items():
        rows: list[Row] = [
            {"stage": stage, "step": step, "seed": index, metric: value * step, "time/seconds": 1.0}
            for step in range(1, num_steps + 1)
            for index, value in enumerate(values)
        ]
        tracker.log(rows)
        if finished:
            ends = ((index, float(value)) for index, value in enumerate(values))
            tracker.log(
                [{"stage": stage, "step": num_steps, "seed": i, "final/x": v} for i, v in ends]
            )
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def beside(a: int = 0) -> dict[str, Any]:
    """Settings of the stages a and b, as conf/base/reinforcement.yaml has them of agents."""
    return {"agents": {"a": {"r": a}, "b": {"r": 0}}}


def collect(*folders: Path, tasks: str | None = None) -> Collection:
    return report.collect([report.read_run(folder) for folder in folders], tasks)


def values(folders: Sequence[Path], metric: str = "final/x") -> dict[str, list[list[float]]]:
    collection = collect(*folders)
    first = next(iter(collection.methods))
    scores = score(collection, metric, first, lower=False)
    return {method: each.values for method, each in scores.items()}


def test_seeds_of_all_runs_are_pooled(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"adamw": [0.1, 0.2, 0.9], "sam": [0.5, 0.3, 0.4]})
    two = write_run(tmp_path / "two", {"adamw": [0.25, 0.3], "sam": [0.2, 0.6]}, seed=10)
    assert values([one, two]) == {
        "adamw": [[0.1, 0.2, 0.9, 0.25, 0.3]],
        "sam": [[0.5, 0.3, 0.4, 0.2, 0.6]],
    }
    notes = report.report([one, two], tmp_path / "out")
    assert notes == []  # five seeds each
    text = (tmp_path / "out" / "report.md").read_text()
    gain = mean_interval([0.4, 0.1, -0.5, -0.05, 0.3])
    line = next(line for line in text.splitlines() if line.startswith("| sam |"))
    # Of 25 pairs sam wins 16, and two are ties.
    # Student's interval of the five values by hand: 0.4 +- 2.776445 * 0.1581139 / sqrt 5.
    cells = ["sam", "5", "0.4", "0.2037 to 0.5963", "0.05", f"{gain.low:.4g} to {gain.high:.4g}",
             "0.4", "-", "0.68", "-"]  # fmt: skip
    assert [cell.strip() for cell in line.split("|")][1:11] == cells
    for name in ("learning_curves", "scores", "gains", "improvement"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in text
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_curves_are_means_over_the_seeds_of_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_run(tmp_path / "one", {"sam": [1.0, 2.0]}, num_steps=500)
    two = write_run(tmp_path / "two", {"sam": [3.0]}, num_steps=400, seed=1, finished=False)
    drawn = []
    monkeypatch.setattr(plots, "band", lambda _, curves, *__, **___: drawn.append(curves))
    plot_curves(collect(one, two), ["accuracy"], tmp_path / "curves.png")
    (curves,) = drawn
    assert curves[1] == [1, 2, 3]
    assert max(curves) == 400  # as far as all seeds are
    assert curves[400] == [400, 800, 1200]
    assert len(curves) == 60


@pytest.mark.parametrize(
    ("stages", "tasks", "methods"),
    [
        ((["train"], ["train"]), (SAM, TRAM), ["attack=sam, rho=0.05", "attack=tram, scale=1.0"]),
        ((["train"], ["train"]), ({}, {}), ["train"]),
        ((["a", "b"], ["a", "b"]), ({"noise": 0.1}, {"noise": 1}),
         ["a, noise=0.1", "b, noise=0.1", "a, noise=1", "b, noise=1"]),
        ((["a"], ["b"]), ({"only": ["a"]}, {"only": ["b"]}), ["a", "b"]),
        ((["a"], ["a"]), ({"x": {"r": 1}, "y": {"r": 2}}, {"x": {"r": 3}, "y": {"r": 4}}),
         ["x.r=1, y.r=2", "x.r=3, y.r=4"]),
        # A setting of a is none of b, which stands beside it; one of what both start from is.
        ((["a"], ["a"], ["b"]), (beside(a=1), beside(a=2), beside(a=3)), ["a, r=1", "a, r=2", "b"]),
        ((["c", "a"], ["c", "b"]), ({"c": {"r": 1}, **beside()}, {"c": {"r": 2}, **beside()}),
         ["c, r=1", "a, r=1", "c, r=2", "b, r=2"]),
    ],
)  # fmt: skip
def test_methods_are_stages_and_what_differs(
    stages: Sequence[list[str]], tasks: Sequence[Any], methods: list[str], tmp_path: Path
) -> None:
    folders = [
        write_run(tmp_path / str(seed), {name: [0.0] for name in names}, task=task, seed=seed)
        for seed, (names, task) in enumerate(zip(stages, tasks, strict=True))
    ]
    assert list(collect(*folders).methods) == methods


def test_the_same_seeds_count_once(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"pretrain": [0.5], "sam": [0.6]}, task={"only": ["sam"]})
    two = write_run(tmp_path / "two", {"pretrain": [0.5], "tram": [0.7]}, task={"only": ["tram"]})
    collection = collect(one, two)
    assert {name: len(seeds) for name, seeds in collection.methods.items()} == {
        "pretrain": 1, "sam": 1, "tram": 1
    }  # fmt: skip
    assert collection.notes == [f"pretrain of {two} is left out: the same seeds as in {one}"]


def test_a_run_that_is_going_on(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", {"sam": [0.6, 0.7], "tram": [0.8, 0.9]})
    going = write_run(tmp_path / "going", {"sam": [0.5, 0.5]}, seed=1, finished=False)
    with (going / "metrics.csv").open("a") as file:
        file.write("sam,3,0,0.12")  # half a line
    assert values([done, going]) == {"sam": [[0.6, 0.7]], "tram": [[0.8, 0.9]]}
    assert values([done, going], "accuracy")["sam"] == [[1.2, 1.4, 1.0, 1.0]]
    few = "fewer than 5 seeds, read the intervals with care: sam, tram"
    assert report.report([done, going], tmp_path / "out") == [few, f"not finished: {going}"]
    assert "| sam 2 |" in (tmp_path / "out" / "report.md").read_text()
    # Alone it has no final metrics: the first one is reported, at its last step.
    report.report([going], tmp_path / "alone")
    assert "## accuracy\n" in (tmp_path / "alone" / "report.md").read_text()
    # A method without the metric is named.
    notes = report.report([done, going], tmp_path / "out", metrics=["final/x", "accuracy"])
    assert notes == [few, f"not finished: {going}"]
    later = write_run(tmp_path / "later", {"new": [1.0]}, seed=2, finished=False)
    assert report.report([done, later], tmp_path / "out")[0] == "new: no final/x yet"


def test_less_is_better(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": [1.0, 2.0], "b": [0.5, 1.5]})
    for lower, probability in ((False, 0.25), (True, 0.75)):
        found = score(collect(folder), "final/x", "a", lower=lower)
        assert found["a"].better is None
        assert found["b"].better is not None
        assert found["b"].better.mean == probability
    report.report([folder], tmp_path / "out", lower=["final/x"])
    assert "| below a |" in (tmp_path / "out" / "report.md").read_text()


def test_tasks_are_scaled_and_aggregated(tmp_path: Path) -> None:
    far = {"domain": "far", "only_here": 1}
    one = write_run(
        tmp_path / "one", {"a": [0.0, 10.0], "b": [20.0, 10.0]}, task={"domain": "near"}
    )
    two = write_run(tmp_path / "two", {"a": [0.1, 0.1], "b": [0.5, 0.4], "c": [0.3]}, task=far)
    collection = collect(one, two, tasks="task.domain")
    scores = score(collection, "final/x", "a", lower=False)
    assert list(scores) == ["a", "b"]  # c has one task alone
    assert scores["a"].values == [[0, 0.5], [0, 0]]
    np.testing.assert_allclose(scores["b"].values, [[1, 0.5], [1, 0.75]])
    assert scores["b"].middle.mean == pytest.approx((0.75 + 1) / 2)
    assert scores["b"].better is not None
    assert scores["b"].better.mean == pytest.approx((3.5 / 4 + 1) / 2)
    notes = report.report([one, two], tmp_path / "out", tasks="task.domain")
    assert notes[0] == "c: no final/x in every task"
    assert "(near, far) are scaled to [0, 1]" in (tmp_path / "out" / "report.md").read_text()


def test_a_column_may_tell_tasks_apart(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": [1.0, 2.0], "b": [3.0, 5.0]})
    lines = (folder / "metrics.csv").read_text().splitlines()
    noisy = [f"{line},{noise}" for line in lines[1:] for noise in (0.2, 0.4)]
    noisy.append("pretrain,1,0,0.5,1.0,,")
    (folder / "metrics.csv").write_text("\n".join([f"{lines[0]},noise", *noisy]) + "\n")
    collection = collect(folder, tasks="noise")
    assert collection.tasks == ["0.2", "0.4"]
    assert list(collection.methods) == ["a", "b"]
    assert "noise" not in collection.metrics()
    scores = score(collection, "final/x", "a", lower=False)
    assert scores["b"].values == [[0.5, 1], [0.5, 1]]


def test_experiments_are_mixed_on_demand_alone(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"ppo": [1.0, 2.0]}, exp="hopper", task={"size": 1})
    two = write_run(tmp_path / "two", {"ppo": [100.0, 300.0]}, exp="ant", task={"size": 2})
    with pytest.raises(ConfigError, match=rf"{one} is of hopper, .*two is of ant; --tasks exp"):
        collect(one, two)
    collection = collect(one, two, tasks="exp")
    assert collection.tasks == ["hopper", "ant"]
    assert list(collection.methods) == ["ppo"]


def test_rank_correlation_over_methods(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"a": [1, 3], "b": [2, 2], "c": [3, 1]})
    collection = collect(run)
    # By hand: 1 - 6 (0 + 1 + 1) / (3 (9 - 1)) = 1/2 in the first seed, -1 in the second.
    for method, y in {"a": (10, 1), "b": (30, 2), "c": (20, 3)}.items():
        for seed, value in zip(collection.methods[method], y, strict=True):
            seed.series["final/y"] = {2: value}
    found = report.rank_correlation(collection, "final/x", "final/y")
    np.testing.assert_allclose(found, mean_interval([0.5, -1]), atol=1e-12)
    pairs = [("final/x", "accuracy"), ("accuracy", "final/x")]
    report.report([run], tmp_path / "out", correlation=pairs)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| final/x and accuracy | 1 | 1 to 1 |" in text
    del collection.methods["c"]
    with pytest.raises(ConfigError, match=r"--correlation: final/x and final/y .* three methods"):
        report.rank_correlation(collection, "final/x", "final/y")


def test_seeds_are_paired_whatever_the_order_of_the_runs(tmp_path: Path) -> None:
    runs = {
        (size, seed): write_run(
            tmp_path / f"{size}_{seed}",
            {"a": [100 * seed + 10 * (i % 2) + size * (1 - 2 * i) for i in range(2)]},
            seed=seed, task={"size": size},
        )
        for size in (0, 1, 2)
        for seed in (0, 1)
    }  # fmt: skip
    orders = [list(runs), sorted(runs, key=lambda key: (key[0], key[1] != (key[0] == 0)))]
    assert orders[0] != orders[1]
    found = []
    for order in orders:
        collection = collect(*(runs[key] for key in order))
        scores = report.score(collection, "final/x", "size=0", lower=False)
        correlation = report.rank_correlation(collection, "final/x", "accuracy")
        found.append((scores["size=1"].values, scores["size=1"].gain, correlation))
    assert found[0] == found[1]
    assert found[0][1] is not None
    assert found[0][2].mean == 1
    del collection.methods["size=2"][0]
    with pytest.raises(ConfigError, match=r"with the same seeds; found \[4, 4, 3\]"):
        report.rank_correlation(collection, "final/x", "accuracy")


def test_a_diverged_seed_is_not_hidden(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": [1.0, 2.0], "b": [math.nan, 1.0]})
    report.report([folder], tmp_path / "out")
    assert (
        "| b | 2 | nan | nan to nan | nan | nan to nan | nan | nan to nan | nan | nan to nan |"
        in (tmp_path / "out" / "report.md").read_text()
    )


def test_methods_can_be_chosen(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"a": [1.0], "b": [2.0], "c": [3.0]})
    report.report([folder], tmp_path / "out", methods=["c", "a"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| above c |" in text
    assert "| b |" not in text
    assert text.index("| c |") < text.index("| a |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "nowhere: holds no run (no config.yaml)"),
        (["bare"], "bare: holds no run (no metrics.csv)"),
        (["empty"], "empty/metrics.csv: has no rows with stage and step yet"),
        (
            ["cut"],
            "cut: cannot be read: cut/metrics.csv: row 1 has 1 cells, but",
        ),
        (["broken"], "broken/config.yaml, line 2: "),
        (["bomb"], "bomb/config.yaml, line 1: got the anchor or alias 'a'"),
        (["search"], "search: stage a has accuracy twice for seed 0 at step 1; --tasks COLUMN"),
        (["run", "run"], "a run is given twice: run run"),
        (["run", "other"], "different experiments: run is of tiny, other is of huge; --tasks exp"),
        (["run", "--metric", "final/y"], "--metric: got 'final/y', the nearest is final/x"),
        (["run", "--baseline", "ax"], "--baseline: got 'ax', the nearest is a"),
        (["run", "--method", "bx"], "--method: got 'bx', the nearest is b"),
        (["run", "--lower", "accuracy"], "--lower: got 'accuracy', the nearest is final/x"),
        (["run", "--tasks", "task.size"], "--tasks: run has no 'task.size', the nearest is "),
        (["run", "--what"], "unrecognized arguments: --what"),
        (["run", "--out", "run/config.yaml"], "[Errno 17] File exists: "),
    ],
)
def test_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), {"a": [1.0], "b": [2.0]})
    write_run(Path("other"), {"a": [1.0]}, exp="huge")
    write_run(Path("broken"), {"a": [1.0]})
    Path("broken/config.yaml").write_text("a: [")
    write_run(Path("bomb"), {"a": [1.0]})
    Path("bomb/config.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]")
    Path("bare").mkdir()
    Path("bare/config.yaml").write_text("exp: tiny")
    write_run(Path("empty"), {})
    Path("cut").mkdir()
    Path("cut/config.yaml").write_text("exp: tiny")
    Path("cut/metrics.csv").write_text("stage,step\na\n")
    search = write_run(Path("search"), {"a": [1.0]})
    lines = (search / "metrics.csv").read_text().splitlines()
    (search / "metrics.csv").write_text("\n".join([*lines[:2], *lines[1:]]) + "\n")
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}")
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert not Path("report").exists()


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), {"a": [1.0], "b": [2.0]})
    monkeypatch.setattr(sys, "argv", ["report", "run", "--baseline", "b"])
    report.main()
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "fewer than 5 seeds, read the intervals with care: a, b",
        "report/report.md",
    ]
    assert output.err == ""
    assert "| above b |" in Path("report/report.md").read_text()
