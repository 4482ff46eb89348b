"""The walk-throughs of CONTRIBUTING.md, followed to the letter in a copy of the repository."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A paragraph that begins with the name of a file, and the block below it.
BLOCK = re.compile(
    r"^`([\w/]+\.\w+)`[^\n]*\n(?:[^\n]+\n)*\n```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL
)
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Of the about fifty tests of a row, those that take no time.
QUICK = "game or test_step or comment or donated or refused or enough or hidden or missing"


def apply(diff: str, path: Path) -> None:
    """Inserts each + line behind the line before it; a line of context is the only one like it."""
    lines, place = path.read_text(encoding="utf-8").splitlines(), 0
    for line in diff.splitlines():
        if line.startswith("+"):
            lines.insert(place, line[1:])
        else:
            assert lines.count(line[1:]) == 1, f"{path}: {line[1:]}"
            place = lines.index(line[1:])
        place += 1
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository with the files and the edits of CONTRIBUTING.md."""
    for name in ("trustjax", "experiments", "benchmarks", "conf", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) + len(COMMANDS.findall(text)) == len(re.findall("^```.+$", text, re.M))
    for name, language, block in blocks:
        path = tmp_path / name
        assert path.exists() == (language == "diff"), name
        if language == "diff":
            apply(block, path)
        else:
            path.write_text(block, encoding="utf-8")
    return tmp_path


def run(folder: Path, *commands: list[str]) -> list[str]:
    """What the commands print, all at once, with the packages of the copy; none may fail."""
    changes = {"PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    together = [
        subprocess.Popen(command, cwd=folder, env=os.environ | changes, **pipes)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in together]
    for process, output in zip(together, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def commands() -> tuple[list[str], list[str]]:
    """Those of the page, for the experiment and for the tests, with this Python."""
    (text,) = COMMANDS.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    lines = text.replace("\\\n", " ").splitlines()
    experiment, tests = (shlex.split(line)[1:] for line in lines)
    assert tests[-2] == "-k"
    return (
        [sys.executable, "-W", "error", *experiment, "tracker=csv", "hydra.run.dir=run"],
        [sys.executable, *tests],
    )


@pytest.mark.slow
def test_the_walk_throughs(tree: Path) -> None:
    experiment, (*tests, selection) = commands()
    ruff = [sys.executable, "-m", "ruff"]
    run(tree, [*ruff, "check", "."], [*ruff, "format", "--check", "."])
    _, printed = run(tree, experiment, [*tests, f"({selection}) and ({QUICK})", "-n", "0", "-q"])
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) > 20  # those of the row among them
    summary = json.loads((tree / "run" / "summary.json").read_text())
    assert summary["result"]["distance"]["high"] < 0.1
    assert (tree / "run" / "plots" / "game.png").stat().st_size > 0


@pytest.mark.slow
def test_all_tests_of_the_walk_throughs(tree: Path) -> None:
    _, tests = commands()
    run(tree, [*tests, "-n", "0", "-q"], [sys.executable, "-m", "mypy"])
