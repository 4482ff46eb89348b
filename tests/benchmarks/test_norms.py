"""The benchmark of norms runs, and writes what it prints."""

import json

import pytest

from benchmarks import norms


def test_norms(tmp_path, capsys):
    norms.main(["--out", str(tmp_path / "out.json"), "--size", "8", "--repeats", "2"])
    found = json.loads((tmp_path / "out.json").read_text())["norms"]["8 x 8"]
    assert found["parameters"] == 256
    assert found["ratio"]["median"] > 0
    assert "4 of 8 x 8: plain" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        norms.main(["--out", str(tmp_path / "out.json"), "--repeats", "0"])
