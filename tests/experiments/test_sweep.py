"""Lists of runs: what they hold, and that the same command goes on."""

import subprocess
import sys

import killing
import pytest

from experiments.runtime.config import check_config, save_config
from experiments.runtime.overrides import composed
from experiments.runtime.targets import ConfigError
from experiments.sweep import Job, check, jobs, sweep

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


def test_names_do_not_collide_and_are_not_too_long():
    same = jobs(["+exp=x", "task.only=[sam],[[sam]],[asam]"])
    assert len({job.name for job in same}) == 3
    assert [job.name.partition("-")[0] for job in same] == ["only_sam", "only_sam", "only_asam"]
    assert same == jobs(["+exp=x", "task.only=[sam],[[sam]],[asam]"])
    assert len({job.name.lower() for job in jobs(["+exp=x", "task.target=a:B,a:b"])}) == 2
    long = jobs(["+exp=x", f"task.only=[{300 * 'a'}],[{300 * 'a'}b]"])
    assert len({job.name for job in long}) == 2
    assert all(len(job.name) < 120 for job in long)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=0,0"], "^seed: got a value twice"),
        (["seed=0", "seed=1"], "^seed: given twice"),
        (["seed=range(0,20000)"], "^seed: more than 10000 values"),
        (["seed=range(0,1000)", "num_seeds=range(1,1000)"], "the values make 999000 jobs"),
        (["task.noise=a=b"], "^task.noise: cannot read 'a=b'"),
    ],
)
def test_wrong_lists(overrides, message):
    with pytest.raises(ConfigError, match=message):
        jobs(["+exp=two_minima", *overrides])


def test_all_jobs_are_checked_before_the_first(tmp_path):
    with pytest.raises(ConfigError, match=r"^job noise_x: task\.noise: got 'x', allowed: a number"):
        check(tmp_path, jobs([*TINY, "task.noise=1,x"]))
    with pytest.raises(ConfigError, match=r"^job optimizer_sam: optimizer: nothing in .* chooses"):
        check(tmp_path, jobs([*TINY, "optimizer=sam,asam"]))


def test_a_run_of_another_configuration(tmp_path):
    listed = jobs([*TINY, "seed=0,1"])
    check(tmp_path, listed)
    (tmp_path / "seed_1").mkdir()
    path = tmp_path / "seed_1" / "config.yaml"
    save_config(check_config(composed([*TINY, "seed=1"])), path)
    check(tmp_path, listed)
    check(tmp_path, jobs([*TINY, "seed=0,1", "tracker=csv"]))  # may differ
    for overrides, message in (
        (["task.noise=2"], rf"^job seed_1: task\.noise: got 2, but {path} has 1\.0"),
        (["+task.methods.x=${task.methods.sam}"], rf"_target_: got .*, but {path} has nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(tmp_path, jobs([*TINY, "seed=0,1", *overrides]))
    path.write_text("seed: [")
    with pytest.raises(ConfigError, match=rf"^job seed_1: {path}, line 2: "):
        check(tmp_path, listed)


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
