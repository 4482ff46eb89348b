"""The wheel holds the library alone, and works outside of a checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
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
def test_a_wheel_works_outside_the_checkout(tmp_path):
    """Built and installed in a new environment, which borrows the dependencies of this one."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", "wheel", str(ROOT), cwd=tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("trustjax-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"trustjax"}
    assert "trustjax/py.typed" in names

    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    call(*pip, "--python", python, "install", "--no-deps", str(wheel), cwd=tmp_path)
    place = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    packages = Path(call(python, "-c", place, cwd=tmp_path).strip())
    # A line in a .pth file adds the folder, and does not read the .pth of an editable install.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    code = (
        "import importlib.util, trustjax, trustjax.agents, trustjax.data, trustjax.models;"
        "print(trustjax.__file__, importlib.util.find_spec('experiments'))"
    )
    path, experiments = call(python, "-c", code, cwd=tmp_path).split()
    assert Path(path).is_relative_to(packages)
    assert experiments == "None"
    (readme,) = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (tmp_path / "example.py").write_text(readme.partition("```")[0])
    assert call(python, "example.py", cwd=tmp_path).strip()
