"""Styles that belong to a method, grids without gaps, and what is drawn."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.analysis import plots
from experiments.analysis.statistics import mean_interval

CONF = Path(__file__).parent.parent.parent / "conf"


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[plots.Figure]:
    figures: list[plots.Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return figures


def curves(names: list[str]) -> dict[str, plots.Curve]:
    return {name: {0.0: [1.0, 2.0], 1.0: [2.0, 4.0]} for name in names}


def test_a_method_looks_the_same_in_every_figure() -> None:
    alone = plots.styles(["tram"])["tram"]
    assert plots.styles(["adamw", "sam", "tram"])["tram"] == alone
    assert plots.styles(["attack=sam", "tram", "new"])["tram"] == alone
    new = plots.styles(["new"])["new"]
    known = plots.styles(plots._INDICES)
    others = [name for name, style in known.items() if style["color"] != new["color"]]
    assert plots.styles([*others, "new"])["new"] == new


def test_no_two_methods_of_a_figure_look_the_same() -> None:
    for names in (map(str, range(64)), [name for row in plots._METHODS for name in row]):
        found = [tuple(style.values()) for style in plots.styles(names).values()]
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("path", sorted((CONF / "methods").glob("*.yaml")), ids=lambda p: p.stem)
def test_methods_of_an_experiment_have_a_style_of_their_own(path: Path) -> None:
    names = [name for name in yaml.safe_load(path.read_text()) if name != "defaults"]
    assert set(names) <= set(plots._INDICES)
    if len(names) <= plots.MOST_TOGETHER:
        assert len({style["color"] for style in plots.styles(names).values()}) == len(names)


def test_agents_of_an_experiment_have_colours_of_their_own() -> None:
    for names in (
        ["mdpo", "trpo", "ppo"],
        [
            "mdpo",
            "mdpo_tsallis_1_4",
            "mdpo_tsallis",
            "mdpo_one_step",
            "mdpo_forward",
            "sac",
            "sac_learned",
        ],
    ):
        assert set(names) <= set(plots._INDICES)
        assert len({style["color"] for style in plots.styles(names).values()}) == len(names)


@pytest.mark.parametrize("path", sorted((CONF / "exp").glob("*.yaml")), ids=lambda p: p.stem)
def test_unknown_names_of_an_experiment_have_colours_of_their_own(path: Path) -> None:
    defaults = yaml.safe_load(path.read_text()).get("defaults", [])
    keys = [key for default in defaults if isinstance(default, dict) for key in default]
    places = [key for key in keys if "@task." in key and key.count(".") == 2]
    names = list(dict.fromkeys(key.split(".")[-1] for key in places))  # an agent and its preset
    new = [name for name in names if name not in plots._INDICES]
    if len(names) <= plots.MOST_TOGETHER:
        colors = [style["color"] for style in plots.styles(names).values()]
        known = {colors[names.index(name)] for name in names if name not in new}
        assert len(set(colors)) == len(new) + len(known)


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (6, 3), (7, 4), (9, 3), (10, 2)]
)
def test_full_grids(count: int, columns: int) -> None:
    assert plots.full_columns(count) == columns


def test_more_than_eight_methods_are_spread_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"m{i}" for i in range(17)]
    figures = drawn(monkeypatch)
    plots.plot_bands([plots.Panel("a", curves(names)), plots.Panel("b", curves(names))], names,
                     Path("x.png"))  # fmt: skip
    axes = figures[0].axes
    assert len(axes) == 6
    seen = [axis.get_legend_handles_labels()[1] for axis in axes]
    assert all(labels[0] == "m0" and len(labels) <= 8 for labels in seen)
    assert {name for labels in seen for name in labels} == set(names)


def test_methods_without_a_curve_are_in_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    names = ["adamw", *(f"m{i}" for i in range(9))]
    plots.plot_bands([plots.Panel("radius", curves(names[1:9]))], names, Path("x.png"))
    (axis,) = figures[0].axes
    assert axis.get_legend_handles_labels()[1] == names[1:9]


def test_rows_of_one_panel_have_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"m{i}" for i in range(9)]
    far = {name: {0.0: [float(i)], 1.0: [2.0 * i]} for i, name in enumerate(names)}
    figures = drawn(monkeypatch)
    plots.plot_bands([plots.Panel("a", far), plots.Panel("b", curves(names))], names, Path("x.png"))
    upper, upper_other, lower, lower_other = figures[0].axes
    assert upper.get_ylim() == lower.get_ylim()
    assert upper_other.get_ylim() == lower_other.get_ylim() != upper.get_ylim()
    assert lower.get_ylim()[1] > 16


def test_legends_have_no_error_bars_and_cover_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    contents = [plots.Panel(str(i), curves(["a", "b"])) for i in range(5)]
    plots.plot_bands(contents, ["a", "b"], Path("x.png"))
    *panels, cell = figures[0].axes  # the legend fills the empty cell of the grid
    assert len(panels) == 5
    assert not cell.axison
    assert [text.get_text() for text in cell.get_legend().get_texts()] == ["a", "b"]
    assert all(axis.get_legend() is None for axis in panels)


def test_bars_are_named_from_top_to_bottom() -> None:
    names = [f"m{i}" for i in range(9)]
    _, (axis,) = plots.bar_panels(1, len(names))
    intervals = {name: mean_interval([i, i + 1]) for i, name in enumerate(names)}
    plots.plot_bars(axis, plots.styles(names), intervals)
    assert [label.get_text() for label in axis.get_yticklabels()] == names
    assert axis.yaxis_inverted()
    middles = [line.get_xdata()[0] for line in axis.get_lines()]
    assert middles == [i + 0.5 for i in range(9)]


def test_gains_are_paired_by_seed() -> None:
    gain = plots.paired_gain({0: [1.0, 5.0], 1: [2.0]}, {0: [0.5, 5.5], 1: [1.0, 2.0]})
    assert gain == {0: [0.5, -0.5]}


def test_metrics_have_titles_in_words_and_one_scale() -> None:
    assert plots.metric_title("trust/radius") == "Radius of the trust region"
    assert plots.metric_title("final/unseen") == "Final unseen"
    assert plots.metric_title("value/explained") == "Value explained"
    assert plots.metric_settings("trust/radius") == {"yscale": "log"}
    assert plots.metric_settings("accuracy/test") == {}


@pytest.mark.parametrize(("highest", "scale"), [(1.0, "linear"), (100.0, "log")])
def test_a_logarithmic_axis_has_a_decade_or_more(
    highest: float, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = drawn(monkeypatch)
    curve = {"sam": {0.0: [0.96, 0.97], 1.0: [highest, highest]}}
    plots.plot_bands([plots.Panel("x", curve, {"yscale": "log"})], ["sam"], Path("x.png"))
    axis = figures[0].axes[0]
    assert axis.get_yscale() == scale
    low, high = axis.get_ylim()
    assert low < 0.96
    assert highest < high


def test_bands_of_logarithms_stay_above_zero() -> None:
    """The interval of 1 and 100 themselves would reach below 0, and the band to the lower end."""
    _, (axis,) = plots.panels(1)
    curve = {0.0: [1.0, 100.0], 1.0: [10.0, 10.0], 2.0: [0.0, 1.0]}
    plots.band(axis, curve, "a", {"color": "#000000"}, logarithmic=True)
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [10, 10, np.nan])
    low = np.nanmin(axis.collections[0].get_paths()[0].vertices[:, 1])
    interval = mean_interval(np.log([1.0, 100.0]))
    np.testing.assert_allclose(low, np.exp(interval.low))
