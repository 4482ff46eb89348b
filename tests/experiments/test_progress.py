"""Bars on a terminal, lines elsewhere."""

import io

import pytest
from rich.console import Console

from experiments.progress import Lines, make_progress
from experiments.trackers import Row

LENGTHS = {"pretrain": 100, "sam": 50}


def rows(stage: str, step: int, losses: tuple[float, float] = (1.0, 2.0)) -> list[Row]:
    """Two seeds of one step; the first column that is not a label is the main metric."""
    return [
        {"stage": stage, "step": step, "seed": seed, "note": "x", "loss": loss, "accuracy": 0.5}
        | {"time/steps_per_second": 12.345}
        for seed, loss in enumerate(losses)
    ]


def printed(terminal: bool, *, seconds: float | None = None) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    progress = make_progress(LENGTHS, console)
    if seconds is not None:
        progress = Lines(LENGTHS, console, seconds)
    progress.cut([])
    progress.log(rows("pretrain", 50))
    progress.log(rows("pretrain", 100))
    progress.log([{"stage": "pretrain", "step": 100, "final": 3.0}])
    progress.log([])
    progress.log(rows("sam", 10, (3.0, 4.0)))
    progress.close()
    return file.getvalue()


def test_one_line_a_stage_elsewhere() -> None:
    assert printed(terminal=False) == "pretrain 100/100 12.3 steps/s loss 1.5\n"


def test_more_lines_when_it_takes_long() -> None:
    assert printed(terminal=False, seconds=0.0).splitlines() == [
        "pretrain 50/100 12.3 steps/s loss 1.5",
        "pretrain 100/100 12.3 steps/s loss 1.5",
        "sam 10/50 12.3 steps/s loss 3.5",
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
    progress.cut(kept)
    progress.close()
    assert shown in file.getvalue()
    assert hidden is None or hidden not in file.getvalue()
