"""Lists of runs: what they hold, and that the same command goes on."""

import subprocess
import sys

import killing
import pytest

from experiments.sweep import Job, jobs, sweep

TINY = ["+exp=two_minima", "task.steps=4", "task.steps_per_chunk=2", "task.num_starts=3"]


def test_every_combination_is_a_job():
    listed = jobs(["+exp=x", "seed=0,1", "task.radii=[0.1],[0.2,0.3]", "task.noise=2"])
    assert [job.name for job in listed] == [
        "seed_0-radii_0.1",
        "seed_0-radii_0.2_0.3",
        "seed_1-radii_0.1",
        "seed_1-radii_0.2_0.3",
    ]
    assert listed[1].overrides == ("+exp=x", "seed=0", "task.radii=[0.2,0.3]", "task.noise=2")
    assert [job.name for job in jobs(["+exp=a,b", "seed=range(2)"])] == [
        f"exp_{name}-seed_{seed}" for name in "ab" for seed in (0, 1)
    ]
    assert jobs(["+exp=x", "seed=3"]) == [Job("run", ("+exp=x", "seed=3"))]


def test_jobs_of_one_name():
    with pytest.raises(ValueError, match=r"must differ .* got twice: .'only_sam'"):
        jobs(["+exp=x", "task.only=[sam],[[sam]]"])


def test_a_job_is_begun_resumed_or_left(tmp_path):
    job = Job("run", ("+exp=x",))
    folder = tmp_path / "o'clock"
    assert job.command(folder)[-2:] == ["+exp=x", f"hydra.run.dir='{tmp_path}/o\\'clock'"]
    folder.mkdir()
    (folder / "config.yaml").touch()
    assert job.command(folder)[-1] == f"resume={folder}"
    (folder / "summary.json").touch()
    assert job.command(folder) is None


@pytest.mark.slow
def test_the_same_command_goes_on(tmp_path, monkeypatch):
    """One job has lost its end, one fails: the next call mends what it can."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    folder, said = tmp_path / "s", []
    listed = jobs([*TINY, "num_seeds=1", "task.radii=[0.5]", "seed=0,-1"])
    assert sweep(folder, listed, workers=2, say=said.append) == 1
    assert sum(": done after" in line for line in said) == 1
    assert "seed: got -1" in (folder / "seed_-1.log").read_text()
    before = killing.metrics(folder / "seed_0")
    (folder / "seed_0" / "summary.json").unlink()
    for words in ("seed_0: done after", "seed_0: done before"):
        assert sweep(folder, listed[:1], say=said.append) == 0
        assert said[-1].startswith(words)
    assert killing.metrics(folder / "seed_0") == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["s", "+exp=x", "--workers", "0"], "--workers: got 0, allowed: an integer >= 1"),
        (["+exp=x", "seed=0,1"], "FOLDER: got '+exp=x', which looks like an override"),
        (["s", "seed=[1,"], "error"),
    ],
)
def test_refused(arguments, words, tmp_path):
    command = [sys.executable, "-m", "experiments.sweep", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
