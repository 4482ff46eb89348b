"""Run folders that were damaged, changed or cannot be written: found, and told in one line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import killing
import numpy as np
import pytest

from experiments import run
from experiments.runtime import recovery
from experiments.runtime.checkpoint import CheckpointMetadata, Checkpoints
from experiments.tasks.two_minima import TwoMinima
from experiments.trackers import read_rows

Call = Callable[..., int]

TINY = (
    "+exp=two_minima",
    "task.steps=6",
    "task.steps_per_chunk=2",
    "task.num_starts=3",
    "task.radii=[0.5]",
    "num_seeds=2",
    "checkpoint.every=2",
    "tracker=csv",
)


def tiny(*changes: str) -> list[str]:
    """`TINY` with other values for some of its keys, and one stage."""
    keys = {change.partition("=")[0] for change in changes}
    kept = [each for each in TINY if each.partition("=")[0] not in keys]
    return [*kept, "~task.methods.sam", *changes]


LONG = tiny("task.steps=1000000", "checkpoint.every=1000000")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Call]:
    """Runs the command line in a folder of its own; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    yield _call
    jax.config.update("jax_enable_x64", False)


def _call(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoMinima, "plot", lambda *_: None)
        for name in ("HYDRA_FULL_ERROR", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS"):
            patch.setenv(name, os.environ.get(name, ""))
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            patch.setenv(name, "1")
        patch.setattr(sys, "argv", ["run", *arguments])
        try:
            run.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, sgd and sam_0.5, with checkpoints at steps 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert _call(*TINY, f"hydra.run.dir={folder}") == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    return error


def test_every_flipped_bit_of_a_checkpoint_is_found(folder: Path) -> None:
    stage = folder / "checkpoints" / "sam_0.5"
    random, missed, number = np.random.default_rng(0), [], 0
    for path in sorted(each for each in (stage / "6").rglob("*") if each.is_file()):
        whole = path.read_bytes()
        size = len(whole)
        for offset in {0, size // 3, size // 2, size - 1, int(random.integers(size))}:
            flip(path, offset, int(random.integers(8)))
            checkpoints = Checkpoints(stage, 2)
            if list(checkpoints.damaged) != [6] or checkpoints.latest().step != 4:
                missed.append((path, offset))
            path.write_bytes(whole)
            number += 1
    assert number > 50
    assert missed == []
    assert Checkpoints(stage, 2).damaged == {}


def _missing(path: Path) -> None:
    (path / "state" / "_METADATA").unlink()


def _extra(path: Path) -> None:
    (path / "state" / "more").write_text("more")


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _truncated(path: Path) -> None:
    os.truncate(path / "state" / "manifest.ocdbt", 50)


def _folder_for_file(path: Path) -> None:
    (path / "mark" / "metadata").unlink()
    (path / "mark" / "metadata").mkdir()


def _file_for_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def _undigested(path: Path) -> None:
    (path / "digests.txt").unlink()


def _pipe(path: Path) -> None:
    (path / "mark" / "metadata").unlink()
    os.mkfifo(path / "mark" / "metadata")


def _earlier(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("4"), path)


def _other_stage(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent.with_name("sgd") / "6", path)


DAMAGES = [_missing, _extra, _empty, _truncated, _folder_for_file, _file_for_folder, _undigested]
DAMAGES += [_pipe, _earlier, _other_stage]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_passed_over(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder / "checkpoints" / "sam_0.5" / "6")
    checkpoints = Checkpoints(folder / "checkpoints" / "sam_0.5", 2)
    assert list(checkpoints.damaged) == [6]
    assert checkpoints.latest().step == 4


def test_goes_on_from_the_newest_whole_one(
    call: Call, folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(folder / "checkpoints" / "sam_0.5" / "6" / "mark" / "metadata", 9, 1)
    assert call(f"resume={folder}") == 0
    first, *_ = (output := capsys.readouterr()).out.splitlines()
    assert re.fullmatch(
        r"damaged: \S+/sam_0.5/6 \(mark/metadata differs from its digest\); "
        r"continuing from step 6 of sgd, step 4 of sam_0.5",
        first,
    )
    assert output.err == ""
    killing.assert_same_runs(finished, folder)
    assert sorted(os.listdir(folder / "checkpoints" / "sam_0.5")) == ["4", "6"]


def test_later_stages_are_trained_again(
    call: Call, folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _truncated(folder / "checkpoints" / "sgd" / "6")
    assert call(f"resume={folder}") == 0
    assert "continuing from step 4 of sgd, step 0 of sam_0.5\n" in capsys.readouterr().out
    killing.assert_same_runs(finished, folder)


def test_a_stage_without_a_whole_one_begins_anew(
    call: Call, folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in "46":
        _truncated(folder / "checkpoints" / "sam_0.5" / step)
    assert call(f"resume={folder}") == 0
    assert "continuing from step 6 of sgd, step 0 of sam_0.5\n" in capsys.readouterr().out
    killing.assert_same_runs(finished, folder)


def test_no_whole_checkpoint(call: Call, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder / "checkpoints").glob("*/*"):
        (path / "digests.txt").unlink()
    before = sorted(folder.rglob("*"))
    assert call(f"resume={folder}") == 1
    error = one_error_line(capsys)
    assert "no checkpoint to continue from; damaged: " in error
    assert "sgd/4 (" in error
    assert sorted(folder.rglob("*")) == before


def test_every_digit_of_the_configuration(
    call: Call, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "config.yaml"
    whole = path.read_text()
    digits = list(re.finditer(r"(?<!\w)\d", whole))
    for digit in digits:
        other = str((int(digit[0]) + 1) % 10)
        path.write_text(whole[: digit.start()] + other + whole[digit.end() :])
        assert call(f"resume={folder}") == 2
        assert "config.yaml" in one_error_line(capsys)
    path.write_text(whole.rpartition("# sha256")[0])
    assert call(f"resume={folder}") == 2
    assert "config.yaml was changed: config.yaml has no digest in its last line; put it back, or " \
        "add edited=config.yaml if the change is meant" in one_error_line(capsys)  # fmt: skip


def test_the_configuration_of_another_run(
    call: Call, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is whole in itself, but not that of the checkpoints."""
    assert call(*tiny("task.noise=2.0"), "hydra.run.dir=other") == 0
    shutil.copy(tmp_path / "other" / "config.yaml", folder)
    capsys.readouterr()
    assert call(f"resume={folder}") == 2
    assert re.search(
        r"config\.yaml was changed: task\.\S+ was .* at the last checkpoint, is ",
        one_error_line(capsys),
    )


def test_edited_on_purpose(call: Call, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("noise: 1.0", "noise: 0.5"))
    assert call(f"resume={folder}", "task.steps=8") == 2
    assert call(f"resume={folder}", "edited=metrics.csv") == 2
    assert "edited: got 'metrics.csv', allowed: config.yaml" in capsys.readouterr().err
    assert call(f"resume={folder}", "edited=config.yaml", "task.steps=8") == 0
    assert "noise: 0.5" in path.read_text()
    assert max(int(row["step"]) for row in read_rows(folder / "metrics.csv")) == 8
    assert call(f"resume={folder}") == 0


def test_edited_after_all_was_done(
    call: Call, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder must not say that the finished run had the other number."""
    path = folder / "config.yaml"
    whole = path.read_text()
    path.write_text(whole.replace("noise: 1.0", "noise: 0.5"))
    assert call(f"resume={folder}", "edited=config.yaml") == 2
    assert "was changed after all was done, which nothing is trained with" in one_error_line(capsys)
    path.write_text(whole)
    assert call(f"resume={folder}") == 0


def test_edited_after_a_stage_was_done(tmp_path: Path) -> None:
    said: list[str] = []
    planned = [
        (SimpleNamespace(name="first", num_steps=8), None, CheckpointMetadata(8, finished=True)),
        (SimpleNamespace(name="longer", num_steps=9), None, CheckpointMetadata(8, finished=True)),
        (SimpleNamespace(name="second", num_steps=8), None, CheckpointMetadata(4)),
    ]
    recovery.check_effect(tmp_path, planned, said.append)
    assert said == ["finished before config.yaml was changed, and not trained again: first"]
    recovery.check_effect(tmp_path, planned[1:], said.append)
    assert len(said) == 1


def test_the_length_of_what_is_measured_at_once(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its stages have one step each, so that a longer run would leave them as they are."""
    small = (
        "+exp=mirror_descent", "num_seeds=2", "task.days=10", "task.num_assets=3", "task.sizes=[4]",
        "task.rounds=20", "task.num_unknowns=6", "task.num_equations=4", "task.num_nonzero=1",
        "task.steps=20", "hydra.run.dir=mirror",
    )  # fmt: skip
    assert call(*small) == 0
    capsys.readouterr()
    assert call("resume=mirror", "task.steps=5000") == 2
    assert "task.steps was 20 at the last checkpoint, is 5000" in one_error_line(capsys)
    assert call("resume=mirror") == 0


def _digit(text: bytes) -> bytes:
    at = text.index(b".") + 1  # a decimal of the first row
    return text[:at] + (b"1" if text[at : at + 1] != b"1" else b"2") + text[at + 1 :]


@pytest.mark.parametrize(
    "change",
    [
        _digit,
        lambda text: text.partition(b"\n")[2],  # the header
        lambda text: text.replace(b"flat", b"flap", 1),
        lambda text: text[:-30],
        lambda text: b"",
        lambda text: text.replace(b"sgd", b"sg\xff", 1),
        lambda text: text.replace(b"sgd", b"s" * 200_000, 1),
        lambda text: text.replace(b",", b",,", 1),
        lambda text: text.replace(b"\n", b"\0\n"),
        lambda text: text.replace(b"sgd", b'"sgd', 1),
    ],
    ids=["digit", "header", "name", "cut", "empty", "utf-8", "huge", "cell", "nul", "quote"],
)
def test_changed_metrics(
    change: Callable[[bytes], bytes], call: Call, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "metrics.csv"
    path.write_bytes(change(path.read_bytes()))
    assert call(f"resume={folder}") == 1
    assert "metrics.csv" in one_error_line(capsys)


@pytest.mark.parametrize("name", ["metrics.csv", ".lock", "config.yaml"])
def test_a_folder_in_place_of_a_file(
    name: str, call: Call, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert call(f"resume={folder}") in (1, 2)
    assert str(folder) in one_error_line(capsys)


@pytest.fixture
def theirs(call: Call, finished: Path) -> Iterator[Path]:
    """A copy of the run that belongs to the user, who is not root."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own places are root's alone
        here = Path(shutil.copytree(finished, Path(place) / "run"))
        assert call(f"resume={here}") == 0  # imports all that it needs
        try:
            if os.geteuid() == 0:
                nobody = 65534
                for path in (Path(place), *Path(place).rglob("*")):
                    os.chown(path, nobody, nobody)
                os.seteuid(nobody)
            yield here
        finally:
            os.seteuid(os.getuid())


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.csv",
        ".lock",
        "checkpoints",
        "checkpoints/sgd",
        "checkpoints/sam_0.5/6",
        "checkpoints/sam_0.5/6/digests.txt",
        "checkpoints/sam_0.5/6/mark/metadata",
        "checkpoints/sam_0.5/6/state",
        "checkpoints/sam_0.5/6/state/manifest.ocdbt",
        "",
    ],
)
def test_what_may_not_be_read(
    name: str, theirs: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the file's name; nothing is taken for damaged, and all stays as it was."""
    capsys.readouterr()
    path = theirs / name
    path.chmod(0)
    try:
        code, error = call(f"resume={theirs}"), one_error_line(capsys)
    finally:
        path.chmod(0o700)
    assert "Permission denied" in error
    assert str(path) in error
    assert code == 1
    assert call(f"resume={theirs}") == 0


def test_numbers_that_are_not_finite_stop_a_run(
    call: Call, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And leave the good checkpoints as they are."""
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("noise: 1.0", "noise: 3.0e+38"))
    assert call(f"resume={folder}", "edited=config.yaml", "task.steps=8") == 1
    error = one_error_line(capsys)
    assert re.search(r"stage sgd: \S+( of seed 0)? is .* at step 8; last checkpoint: step 6", error)
    assert sorted(os.listdir(folder / "checkpoints" / "sgd")) == ["4", "6"]
    assert Checkpoints(folder / "checkpoints" / "sgd", 2).damaged == {}


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        killing.command(arguments),
        env=killing.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(folder: Path, process: subprocess.Popen[str]) -> None:
    while not (folder / "metrics.csv").is_file() or not read_rows(folder / "metrics.csv"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_a_checkpoint_and_a_clean_end(number: signal.Signals, tmp_path: Path) -> None:
    process = start(*LONG, f"hydra.run.dir={tmp_path}")
    wait_for_rows(tmp_path, process)
    process.send_signal(number)
    started = time.monotonic()
    output, error = process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert process.returncode == 128 + number, error
    stopped = f"stopped; continue with: python -m experiments.run resume={tmp_path}"
    assert output == f"sgd: compiling ...\n{stopped}\n"
    last = int(read_rows(tmp_path / "metrics.csv")[-1]["step"])
    assert Checkpoints(tmp_path / "checkpoints" / "sgd", 2).latest().step == last
    result = killing.train_to_end([f"resume={tmp_path}", f"task.steps={last + 2}"])
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """The chunk is long; what was saved before stays whole."""
    short = tiny("task.steps=4", "checkpoint.every=1000000")
    first = killing.train_to_end([*short, f"hydra.run.dir={tmp_path}"])
    assert first.returncode == 0, first.stderr
    process = start(f"resume={tmp_path}", "task.steps=1000000")
    while read_rows(tmp_path / "metrics.csv")[-1]["step"] == 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert process.returncode in (130, 143)
    assert "Traceback" not in error
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "sgd", 2)
    assert (checkpoints.damaged, checkpoints.all_metadata()[0].step) == ({}, 4)
    last = int(read_rows(tmp_path / "metrics.csv")[-1]["step"])
    result = killing.train_to_end([f"resume={tmp_path}", f"task.steps={last + 2}"])
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_two_of_sigint_within_a_chunk(tmp_path: Path) -> None:
    """The first one waits for the chunk, which would take minutes; the second does not."""
    long = ("task.steps_per_chunk=10000000", "task.num_starts=1", "num_seeds=1")
    first = killing.train_to_end([*tiny("task.steps=4", *long), f"hydra.run.dir={tmp_path}"])
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "metrics.csv").read_bytes()
    process = start(f"resume={tmp_path}", "task.steps=10000000")
    assert process.stdout is not None
    assert process.stderr is not None
    assert "compiling" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "stopping after this chunk; once more stops at once\n"
    with pytest.raises(subprocess.TimeoutExpired):  # it goes on
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    output, error = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert (process.returncode, output, error) == (130, "", "")
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "sgd", 2)
    assert (checkpoints.damaged, checkpoints.latest().step) == ({}, 4)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    result = killing.train_to_end([f"resume={tmp_path}", "task.steps=6"])
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An own file system of 3 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk(mounted: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of a save: one line, nothing half-written, and it goes on with more room."""
    here = mounted / "run"
    large = tiny("task.num_starts=20000", "task.steps=2")
    assert call(*large, f"hydra.run.dir={here}") == 0
    filler = mounted / "filler"
    free = shutil.disk_usage(mounted).free
    filler.write_bytes(bytes(free - 200_000))
    capsys.readouterr()
    assert call(f"resume={here}", "task.steps=4") == 1
    error = one_error_line(capsys)
    assert "cannot save step 4 in " in error
    assert "(step 2 is whole)" in error
    assert os.listdir(here / "checkpoints" / "sgd") == ["2"]
    assert list(here.rglob("*.new*")) == []
    with filler.open("ab", buffering=0) as file:  # until none is left
        file.write(bytes(shutil.disk_usage(mounted).free))
    assert call(f"resume={here}", "task.steps=4") == 1
    assert "cannot " in one_error_line(capsys)
    filler.unlink()
    assert call(f"resume={here}", "task.steps=4") == 0
    assert read_rows(here / "metrics.csv")[-1]["step"] == 4


@pytest.mark.slow
def test_a_folder_that_is_read_only(
    mounted: Path, call: Call, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Path(shutil.copytree(folder, mounted / "run"))
    remount = ["mount", "-o", "remount,ro", str(mounted)]
    if subprocess.run(remount, capture_output=True, check=False).returncode:
        pytest.skip("cannot be mounted again")
    capsys.readouterr()
    assert call(f"resume={here}", "task.steps=8") == 1
    assert "Read-only file system" in one_error_line(capsys)
    assert call(*TINY, f"hydra.run.dir={mounted / 'other'}") == 2
    assert "Read-only file system" in one_error_line(capsys)


@pytest.mark.slow
def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    first = start(*LONG, f"hydra.run.dir={tmp_path}")
    wait_for_rows(tmp_path, first)
    for arguments in ([*LONG, f"hydra.run.dir={tmp_path}"], [f"resume={tmp_path}"]):
        second = killing.train_to_end(arguments)
        assert second.returncode == 2
        assert second.stderr == f"error: {tmp_path} is in use by another run\n"
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 143
    last = int(read_rows(tmp_path / "metrics.csv")[-1]["step"])
    result = killing.train_to_end([f"resume={tmp_path}", f"task.steps={last + 2}"])
    assert (result.returncode, result.stderr) == (0, "")
