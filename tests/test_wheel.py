"""The wheel holds all that a run needs."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_wheel_runs_outside_the_checkout(tmp_path):
    """Built and installed in a new environment, which borrows the dependencies of this one."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", "wheel", str(ROOT), cwd=tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("trustjax-*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    call(*pip, "--python", python, "install", "--no-deps", str(wheel), cwd=tmp_path)
    place = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    packages = Path(call(python, "-c", place, cwd=tmp_path).strip())
    # A line in a .pth file adds the folder, and does not read the .pth of an editable install.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = "import trustjax, experiments; print(trustjax.__file__, experiments.__file__)"
    for path in call(python, "-c", where, cwd=elsewhere).split():
        assert Path(path).is_relative_to(packages)
    small = ["task.steps=50", "task.num_starts=10", "num_seeds=2", "hydra.run.dir=run"]
    call(python, "-m", "experiments.run", "+exp=two_minima", *small, cwd=elsewhere)
    assert (elsewhere / "run" / "plots" / "share.png").is_file()
    assert (packages / "trustjax" / "py.typed").is_file()
