"""The command line."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import killing
import optax
import pytest
import yaml

from experiments import run
from experiments.runtime.config import check_config, save_config
from experiments.runtime.overrides import composed
from experiments.tasks.two_minima import TwoMinima
from experiments.trackers import read_rows
from trustjax._checks import MissingPackageError
from trustjax.data import DataError

Call = Callable[..., int]

# Two stages of two chunks.
TINY = (
    "+exp=two_minima",
    "task.steps=4",
    "task.steps_per_chunk=2",
    "task.num_starts=3",
    "task.radii=[0.5]",
    "num_seeds=2",
    "checkpoint.every=1000000",
)

plot = TwoMinima.plot


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Call]:
    """Runs the command line in a folder of its own; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TwoMinima, "plot", lambda *_: None)
    for name in ("HYDRA_FULL_ERROR", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "1")  # leave the settings of the test process

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        try:
            run.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    yield call
    jax.config.update("jax_enable_x64", False)


@pytest.mark.table
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sead=1"], "sead: unknown key, the nearest is seed"),
        (["seed=abc"], "seed: got 'abc', allowed: an integer"),
        (["num_seeds=0"], "num_seeds: got 0, allowed: an integer >= 1"),
        (["tracker=cvs"], "tracker: got 'cvs', the nearest is csv"),
        (["task.steps=abc"], "task.steps: got 'abc', allowed: an integer"),
        (["task.stepz=3"], "task.stepz: unknown key, the nearest is task.steps"),
        (["task.steps=0"], "task.steps must be >= 1, got 0"),
        (
            ["task.steps=[1,"],
            "task.steps: cannot read '[1,' (no viable alternative",
        ),
        (["task.noise=a=b"], "task.noise: cannot read 'a=b'"),
        (["task.noise=" + 300 * "[" + 300 * "]"], "task.noise: got brackets 300 deep"),
        (["two"], "two: got no value, allowed: key=value"),
        (["optimizer=sam"], "optimizer: nothing in +exp=two_minima chooses one"),
        (["+optimizer=sam"], "optimizer: nothing in +exp=two_minima reads it"),
        (
            ["optimizer.learning_rate=9"],
            "optimizer.learning_rate: nothing in",
        ),
        (["task.methods.sam._partial_=7"], "task.methods.sam._partial_: got 7, allowed: true or"),
        (["--multirun", "seed=0,-1"], "seed: got -1, allowed: an integer >= 0"),
        (["resume=~nobody_of_this_name/x"], "resume: got '~nobody_of_this_name/x': Could not"),
        ([f"resume={300 * 'x'}"], "resume: got 'xxx"),
        (["resume=\0"], "resume: got "),
        (["task.noise=${foo}"], "task.noise: Interpolation key 'foo' not found"),
        (["task.optimizer.momentun=1"], "task.optimizer.momentun: unknown key, the nearest is"),
        (["task.optimizer._target_=os.system"], "task.optimizer._target_: got 'os.system'"),
        (["task.methods.sam.x=1"], "task.methods.sam.x: unknown key"),
        (["~task.optimizer"], "task: missing a required argument: 'optimizer'"),
        (["~deterministic"], "deterministic: got None, allowed: true or false"),
        (["~deterministic=true"], "deterministic: missing"),
        (["checkpoint=3"], "checkpoint: got 3, allowed: the keys every, keep"),
        (["--exp=x"], "--experimental-rerun: not allowed"),
        (["hydra.run.dir=/dev/null/x"], "hydra.run.dir: [Errno 20]"),
        (["resume=/nowhere"], "resume: got '/nowhere', which holds no run"),
        (["resume=a", "resume=b"], "resume: got more than a folder"),
        (["resume=a", "--multirun"], "resume: got more than a folder"),
    ],
)
def test_one_line_and_exit_code_2(
    arguments: list[str], message: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("+exp=two_minima", *arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}")
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert not list(Path.cwd().glob("runs/two_minima/*"))  # nothing is left behind


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MissingPackageError('No module named "x"; run: pip install "trustjax[text]"'), 1),
        (DataError("corpus: no text"), 2),
    ],
)
def test_a_start_without_package_or_data_is_one_line_and_leaves_nothing(
    error: Exception,
    code: int,
    call: Call,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stages(task: TwoMinima) -> None:
        raise error

    monkeypatch.setattr(TwoMinima, "stages", stages)
    assert call(*TINY) == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.endswith(f"{error}\n")
    assert printed.count("\n") == 1
    assert not list(Path.cwd().glob("runs/two_minima/*"))


@pytest.mark.parametrize("argument", ["+exp=", "exp=", "+exp=two_minma", "two_minima", "", None])
def test_listing(argument: str | None, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*([] if argument is None else [argument])) == 2
    output = capsys.readouterr()
    assert "\n  two_minima " in output.out
    assert "SAM leaves a sharp minimum for a flat one" in output.out
    nearest = "exp: got 'two_minma', the nearest is two_minima\n"
    assert (nearest in output.out) == (argument == "+exp=two_minma")


def test_a_run_and_its_folder(
    call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TwoMinima, "plot", plot)
    assert call(*TINY, "hydra.run.dir=here", "precision=float64") == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "sam_0.5 4/4" in output.out  # progress
    assert "Walkers that end in the flat minimum" in output.out
    assert output.out.endswith("\nhere\n")
    here = Path("here")
    assert sorted(path.name for path in here.iterdir() if path.name[0] != ".") == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "plots",
        "summary.json",
        "tensorboard",
    ]
    assert sorted(path.name for path in (here / "plots").iterdir()) == [
        "landscape.png",
        "share.png",
    ]
    assert sorted(path.name for path in (here / "tensorboard").iterdir()) == ["sam_0.5", "sgd"]
    rows = read_rows(here / "metrics.csv")
    assert [row["step"] for row in rows] == 2 * [2, 2, 4, 4]
    assert list(rows[0])[:4] == ["stage", "step", "seed", "flat"]
    state = killing.newest_state(here / "checkpoints" / "sgd")
    assert state["position"].dtype == "float64"
    config = yaml.safe_load((here / "config.yaml").read_text())
    assert config["exp"] == "two_minima"
    assert config["task"]["num_seeds"] == 2  # interpolations are resolved
    assert config["task"]["precision"] == "float64"
    assert config["task"]["sharp_width"] == 0.3  # a default of the code
    summary = json.loads((here / "summary.json").read_text())
    assert list(summary["result"]) == ["sgd", "sam_0.5"]
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["seconds"] > 0
    environment = json.loads((here / "environment.json").read_text())
    assert "+exp=two_minima" in environment["command"]
    head = subprocess.run(
        ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        capture_output=True,
        text=True,
    )
    if head.returncode == 0:  # not from an unpacked archive
        assert environment["commit"]["hash"] == head.stdout.strip()
        assert isinstance(environment["commit"]["changed"], bool)


def test_resume(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*TINY, "~task.methods.sam", "hydra.run.dir=here", "tracker=csv") == 0
    first = capsys.readouterr().out
    metrics = Path("here/metrics.csv").read_text()
    assert call(*TINY, "hydra.run.dir=here") == 2
    assert "here holds a run already; continue it with: " in (error := capsys.readouterr().err)
    assert "python -m experiments.run resume=here" in error
    # A finished run prints its table again.
    assert call("resume=here") == 0
    assert capsys.readouterr().out == first[first.index("Walkers") :]
    assert Path("here/metrics.csv").read_text() == metrics
    for wrong in ("seed=1", "task.noise=3", "+exp=two_minima"):
        assert call("resume=here", wrong) == 2
        assert capsys.readouterr().err.startswith(f"error: {wrong.strip('+').split('=')[0]}: got")
    assert call("resume=here", "task.steps=abc") == 2
    assert "task.steps: got 'abc', allowed: an integer" in capsys.readouterr().err
    assert call("resume=here", "task.steps=3") == 2
    assert "stage sgd must have at least 4 steps" in capsys.readouterr().err
    assert yaml.safe_load(Path("here/config.yaml").read_text())["task"]["steps"] == 4
    # A longer one continues, and remembers its length and its tracker.
    assert call("resume=here", "task.steps=6", "tracker=default") == 0
    assert {row["step"] for row in read_rows(Path("here/metrics.csv"))} == {2, 4, 6}
    config = yaml.safe_load(Path("here/config.yaml").read_text())
    assert (config["task"]["steps"], list(config["tracker"])) == (6, ["tensorboard"])


def test_a_start_that_was_cut_off(call: Call) -> None:
    Path("here/checkpoints/sgd").mkdir(parents=True)
    for name in (".lock", "environment.json", "config.yaml.new"):
        Path("here", name).write_text("{")
    assert call("resume=here") == 2
    assert call(*TINY, "~task.methods.sam", "tracker=csv", "hydra.run.dir=here") == 0


def test_tab_completion(
    call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line, expected in (
        ("python -m experiments.run +exp=two", "+exp=two_minima"),
        ("python3.11 -m experiments.run +exp=two", "+exp=two_minima"),
        ("python experiments/run.py see", "seed="),
    ):
        monkeypatch.setenv("COMP_LINE", line)
        assert call("-sc", "query=bash") == 0
        assert capsys.readouterr().out.split() == [expected]
    assert call("-sc", "install=tcsh") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --shell-completion: No completion plugin for 'tcsh'")
    assert call("-sc", "install=bash") == 0
    script = capsys.readouterr().out
    assert '"-m experiments.run"' in script
    script += (
        '\nCOMP_LINE="python -m experiments.run +exp=two"; COMP_CWORD=3; hydra_bash_completion'
    )
    script += '\necho "${COMPREPLY[@]}"'
    script = script.replace("complete -o", ": -o")  # a shell that is not interactive lacks it
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**killing.environment(), "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout == "+exp=two_minima\n", result.stderr


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: "", "got no keys"),
        (lambda text: "- 1\n", "config.yaml, line 1: got no keys"),
        (
            lambda text: text.replace("\nseed: 0", "\nseed: x"),
            r", line \d+: seed: got 'x', allow",
        ),
        (lambda text: text.replace("steps: 4", "steps: 0"), r", line \d+: task.steps must be >= 1"),
        (lambda text: text.replace("noise:", "noize:"), r", line \d+: task.noize: unknown key"),
        (lambda text: text.replace("\nprecision:", "\nx:"), r", line \d+: x: unknown key"),
        (
            lambda text: text.replace("deterministic: true\n", ""),
            "config.yaml: deterministic is missing",
        ),
        (
            lambda text: text.replace("  every: 1000000\n", ""),
            r", line \d+: checkpoint.every: missing",
        ),
    ],
)
def test_a_config_that_was_changed(
    edit: Callable[[str], str], message: str, call: Call, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    Path("here").mkdir()
    config = check_config(composed([*TINY]))
    save_config(config, Path("here/config.yaml"))
    before = Path("here/config.yaml").read_text()
    Path("here/config.yaml").write_text(edit(before))
    assert edit(before) != before
    assert call("resume=here", "edited=config.yaml") == 2
    error = capsys.readouterr().err
    assert re.match(r"error: here/config\.yaml", error)
    assert re.search(message, error)
    assert error.count("\n") == 1


@pytest.mark.table
@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["+exp=sam_vision", "data=mnist"], "data.path"),
        (["+exp=sam_vision", "data=folder", "data.path=/nowhere"], "data.path"),
        (["+exp=tram_vision", "data=cifar10"], "data.path"),
        (["+exp=tram_vision", "model=vit_pretrained", "model.pretrained=a/b"], "model.pretrained"),
    ],
)
def test_the_key_of_data_and_weights_that_are_not_there(
    arguments: list[str],
    key: str,
    call: Call,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the one to override, and once more in a resumed run the one in config.yaml."""

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert call(*arguments, "num_seeds=1", "hydra.run.dir=here") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {key} must be a folder or a hub id")
    assert error.count("\n") == 1
    Path("here").mkdir()
    save_config(check_config(composed(arguments)), Path("here/config.yaml"))
    assert call("resume=here") == 2
    error = capsys.readouterr().err
    assert re.match(rf"error: here/config\.yaml, line \d+: task\.{key} must be a folder", error)
    assert error.count("\n") == 1


@pytest.mark.parametrize("argument", ["model.activation=sine", "task.steps=0"])
def test_the_key_of_an_argument(
    argument: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the task or of what it holds."""
    assert call("+exp=sam_vision", argument, "hydra.run.dir=here") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {argument.partition('=')[0]} must be ")
    assert error.count("\n") == 1


def test_what_a_library_refuses_is_one_line(
    call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same error from code of this project is a fault of it, and keeps its traceback."""

    def stages(task: TwoMinima) -> list[Any]:
        optax.cosine_decay_schedule(1.0, decay_steps=-1)
        return []

    monkeypatch.setattr(TwoMinima, "stages", stages)
    assert call(*TINY, "hydra.run.dir=here") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: task: The cosine_decay_schedule requires positive decay_steps")
    assert error.count("\n") == 1

    def wrong(task: TwoMinima) -> list[Any]:
        raise ValueError("x must be y, got z")

    monkeypatch.setattr(TwoMinima, "stages", wrong)
    assert call(*TINY, "hydra.run.dir=there") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_in_use(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    Path("here").mkdir()
    with filelock.FileLock("here/.lock"):
        assert call(*TINY, "hydra.run.dir=here") == 2
    assert capsys.readouterr().err.endswith("here is in use by another run\n")


def test_a_folder_that_cannot_be_written(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    Path("here").mkdir()
    Path("here/checkpoints").write_text("a file in its place")
    assert call(*TINY, "hydra.run.dir=here") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write to ")
    assert error.count("\n") == 1


def test_multirun(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["task.noise=0,1", "~task.methods.sam", "hydra.sweep.dir=sweep", "tracker=csv"]
    assert call("--multirun", *TINY, *sweep) == 0
    noises = [
        yaml.safe_load((folder / "config.yaml").read_text())["task"]["noise"]
        for folder in sorted(path for path in Path("sweep").iterdir() if path.is_dir())
    ]
    assert noises == [0, 1]
    output = capsys.readouterr().out
    assert output.count("Walkers that end") == 2
    for job, noise in enumerate((0, 1)):
        assert f"job {job}: ++task.noise={noise}\n" in output


def test_wrong_configuration_in_a_process_of_its_own() -> None:
    result = killing.train_to_end(["+exp=two_minima", "seed=abc"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: seed: got 'abc', allowed: an integer\n"


def test_root_errors_come_before_jax_is_imported() -> None:
    code = "import sys; from experiments.run import main; sys.argv[1:] = ['sead=1']\n"
    code += "try: main()\nexcept SystemExit: print('jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


@pytest.mark.slow
def test_ctrl_c_and_resume(tmp_path: Path) -> None:
    long = [*TINY, "~task.methods.sam", "task.steps=100000", f"hydra.run.dir={tmp_path}"]
    process = subprocess.Popen(
        killing.command(long),
        env=killing.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(read_rows(tmp_path / "metrics.csv")) < 4 and process.poll() is None:
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip() == "stopping after this chunk; once more stops at once"
    stopped = f"stopped; continue with: python -m experiments.run resume={tmp_path}"
    assert output == f"sgd: compiling ...\n{stopped}\n"
    (step,) = (int(path.name) for path in (tmp_path / "checkpoints" / "sgd").iterdir())
    assert step == read_rows(tmp_path / "metrics.csv")[-1]["step"]
    result = killing.train_to_end([f"resume={tmp_path}", f"task.steps={step + 3}"])
    assert result.returncode == 0
    assert {row["step"] for row in read_rows(tmp_path / "metrics.csv")} >= {step, step + 3}


def test_second_ctrl_c_stops_at_once() -> None:
    code = (
        "import time\nfrom experiments.runtime.stopping import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01); signals.received and print('stopping', flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"  # it goes on
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    task = ["task.radii=[0.3,0.6]", "task.steps=2025", "task.num_starts=50"]
    killing.assert_survives_kills(["+exp=two_minima", *task, "checkpoint.every=100"], tmp_path)


@pytest.mark.parametrize("before", ["", "--a=1"])
def test_flags_for_xla(monkeypatch, before):
    monkeypatch.setenv("XLA_FLAGS", before)
    for _ in range(2):  # twice is as once
        run.set_environment(deterministic=True)
    assert os.environ["XLA_FLAGS"] == f"{before} {run._DETERMINISTIC}".strip()
