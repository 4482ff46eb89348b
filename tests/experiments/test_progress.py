"""Bars on a terminal, lines elsewhere."""

import io

import pytest
from rich.console import Console

from experiments.runtime.progress import Lines, make_progress
from experiments.trackers import Row

LENGTHS = {"pretrain": 100, "sam": 50}


def rows(
    stage: str, step: int, losses: tuple[float, float] = (1.0, 2.0), speed: float = 12.345
) -> list[Row]:
    """Two seeds of one step; the first column that is not a label is the main metric."""
    return [
        {"stage": stage, "step": step, "seed": seed, "note": "x", "loss": loss, "accuracy": 0.5}
        | {"time/seconds": 71.2, "time/steps_per_second": speed}
        for seed, loss in enumerate(losses)
    ]


def printed(terminal: bool, *, seconds: float | None = None) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    progress = make_progress(LENGTHS, console)
    if seconds is not None:
        progress = Lines(LENGTHS, console, seconds)
    progress.resume_from([])
    progress.log(rows("pretrain", 50))
    progress.log(rows("pretrain", 100))
    progress.log([{"stage": "pretrain", "step": 100, "final": 3.0}])
    progress.log([])
    progress.log(rows("sam", 10, (3.0, 4.0)))
    progress.close()
    return file.getvalue()


def test_one_line_a_stage_elsewhere() -> None:
    assert printed(terminal=False).splitlines() == [
        "pretrain: compiling ...",
        "pretrain 100/100  1:11  12.3 steps/s  loss 1.5",
        "sam: compiling ...",
    ]


def test_more_lines_when_it_takes_long() -> None:
    assert printed(terminal=False, seconds=0.0).splitlines() == [
        "pretrain: compiling ...",
        "pretrain 50/100  1:11  12.3 steps/s  loss 1.5",
        "pretrain 100/100  1:11  12.3 steps/s  loss 1.5",
        "sam: compiling ...",
        "sam 10/50  1:11  12.3 steps/s  loss 3.5",
    ]


def test_bars_on_a_terminal() -> None:
    last = printed(terminal=True).rsplit("\x1b[2K", 1)[-1]
    for text in ("pretrain", "100/100", "sam", "10/50", "12.3 steps/s", "loss 3.5"):
        assert text in last


@pytest.mark.parametrize(
    ("kept", "shown", "hidden"),
    [([], "pretrain", "sam"), (rows("pretrain", 100), "sam", None)],
)
def test_bars_start_where_the_run_is(kept: list[Row], shown: str, hidden: str | None) -> None:
    file = io.StringIO()
    progress = make_progress(LENGTHS, Console(file=file, force_terminal=True, width=100))
    progress.resume_from(kept)
    progress.close()
    assert shown in file.getvalue()
    assert hidden is None or hidden not in file.getvalue()


def test_rates_without_exponents_and_without_compilation() -> None:
    file = io.StringIO()
    progress = Lines(LENGTHS, Console(file=file, width=100), seconds=0.0)
    first = [{k: v for k, v in row.items() if k != "time/steps_per_second"}
             for row in rows("pretrain", 10)]  # fmt: skip
    progress.log(first)
    progress.log(rows("pretrain", 20, speed=27_512.3, losses=(20_000.0, 30_000.0)))
    progress.log(rows("pretrain", 30, speed=0.123))
    assert file.getvalue().splitlines() == [
        "pretrain 10/100  1:11  loss 1.5",
        "pretrain 20/100  1:11  27,512 steps/s  loss 25,000",
        "pretrain 30/100  1:11  0.12 steps/s  loss 1.5",
    ]


def test_bars_tell_that_they_compile() -> None:
    file = io.StringIO()
    progress = make_progress(LENGTHS, Console(file=file, force_terminal=True, width=100))
    progress.resume_from([])
    progress.close()
    assert "0:00:00" in file.getvalue()
    assert "compiling ..." in file.getvalue()


def test_rows_that_count_in_other_units() -> None:
    file = io.StringIO()
    progress = make_progress({"portfolio": 1, "game": 1}, Console(file=file, width=100))
    progress.resume_from([])
    progress.log(rows("portfolio", 1000))
    assert file.getvalue().splitlines() == [
        "portfolio: compiling ...",
        "portfolio 1/1  1:11  12.3 steps/s  loss 1.5",
        "game: compiling ...",
    ]
