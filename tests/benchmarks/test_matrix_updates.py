"""The benchmark of updates, on tiny matrices: what it runs, not how long it takes."""

import json

import jax
import pytest

from benchmarks import matrix_updates
from benchmarks.matrix_updates import OPTIMIZERS


def test_numbers_of_one_matrix(tmp_path, capsys):
    """Muon and AuON have one momentum buffer, AdamW two; the update moves the weights."""
    out = tmp_path / "numbers.json"
    matrix_updates.main(["--out", str(out), "--size", "32", "--repeats", "2"])
    (found,) = json.loads(out.read_text())["parameters"].values()
    assert found["rows"].keys() == OPTIMIZERS.keys()
    assert found["parameters"] == 32 * 32
    state = {name: row["state_per_parameter_byte"] for name, row in found["rows"].items()}
    assert state["adamw"] == pytest.approx(2, abs=0.1)
    for name in ("sgd", "auon", "hybrid_auon", "optax.contrib.muon"):
        assert state[name] == pytest.approx(1, abs=0.1)
    assert "hybrid_auon" in capsys.readouterr().out


def test_transformer_has_the_matrices_of_twelve_layers():
    """85 million parameters, as GPT-2 small has without embeddings."""
    shapes = jax.tree.leaves(matrix_updates.transformer(), is_leaf=lambda x: isinstance(x, tuple))
    assert sum(len(shape) == 2 for shape in shapes) == 48
    count = sum(jax.numpy.prod(jax.numpy.array(shape)).item() for shape in shapes)
    assert count == 12 * (12 * 768**2 + 13 * 768)


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--size", "1"]])
def test_refused(arguments, tmp_path):
    with pytest.raises(SystemExit):
        matrix_updates.main(["--out", str(tmp_path / "x"), *arguments])


def test_only_some(tmp_path):
    """Ratios are to AdamW, which must be among them; those between the others are left out."""
    out = tmp_path / "numbers.json"
    tiny = ["--out", str(out), "--size", "32", "--repeats", "1"]
    matrix_updates.main([*tiny, "--only", "adamw", "auon"])
    (found,) = json.loads(out.read_text())["parameters"].values()
    assert found["rows"].keys() == {"adamw", "auon"}
    assert "muon_to_auon" not in found
    with pytest.raises(SystemExit):
        matrix_updates.main([*tiny, "--only", "auon"])
