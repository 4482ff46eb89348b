"""The table on the console, in a terminal that is too narrow for it."""

from rich.console import Console

from experiments.runtime.session import _drawn
from experiments.runtime.task import Table


def test_names_stay_whole() -> None:
    names = ["adpo_refreshed", "adpo_refreshed/implied"]
    columns = ["method", *(f"calibration error {i}, %" for i in range(8))]
    rows = [[name, *(["-3.141\n-3.388 to -2.895"] * 8)] for name in names]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(_drawn(Table("Held-out choices", columns, rows)))
    printed = captured.get()
    assert all(f"│ {name} " in printed for name in names)
    assert printed.count("-3.141") == 16
    assert max(map(len, printed.splitlines())) <= 120
