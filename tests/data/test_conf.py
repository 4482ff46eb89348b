"""The yaml files of conf/data build functions that load datasets."""

import os
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_first_line_describes(file: Path) -> None:
    assert file.read_text().startswith("# ")


def test_digits() -> None:
    assert instantiate(OmegaConf.load(CONF / "digits.yaml"))().name == "digits"


def test_folder_needs_a_path() -> None:
    with pytest.raises(MissingMandatoryValue, match="path"):
        OmegaConf.to_container(OmegaConf.load(CONF / "folder.yaml"), throw_on_missing=True)


@pytest.mark.skipif("TRUSTJAX_DATA" not in os.environ, reason="set TRUSTJAX_DATA to a data folder")
@pytest.mark.parametrize("name", ["mnist", "folder"])
def test_path_and_split_can_be_overridden(name: str) -> None:
    path = str(Path(os.environ["TRUSTJAX_DATA"]) / "mnist")
    dataset = instantiate(OmegaConf.load(CONF / f"{name}.yaml"), path=path, split="test")()
    assert dataset.images.shape == (10_000, 28, 28, 1)
