"""The yaml files of conf/data build functions that load datasets."""

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from PIL import Image
from pyarrow import parquet

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


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    """Its files have two columns of class labels."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    table = pa.table(
        {"img": [{"bytes": buffer.getvalue()}], "fine_label": [19], "coarse_label": [11]}
    )
    features = {"img": {"_type": "Image"}, "fine_label": {"_type": "ClassLabel"},
                "coarse_label": {"_type": "ClassLabel"}}  # fmt: skip
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    file = tmp_path / "train-00000-of-00001.parquet"
    parquet.write_table(table.replace_schema_metadata(metadata), file)
    dataset = instantiate(OmegaConf.load(CONF / "cifar100.yaml"), path=str(tmp_path))()
    assert dataset.labels.tolist() == [19]
