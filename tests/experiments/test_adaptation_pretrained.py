"""The adaptation experiment from a checkpoint: on digits, from a tiny random one."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import load_file, save_file

from experiments import run
from experiments.runtime.building import build
from experiments.runtime.checkpoint import Checkpoints
from experiments.runtime.config import CONF
from trustjax.models import PretrainedViT, pretrained_vit, save_pretrained

GOLDEN = Path(__file__).parents[1] / "golden" / "vit" / "pooler_bfloat16"
SMALL = [
    "+exp=tram_vision",
    "task.target=null",
    "task.unseen=[contrast:3]",
    "task.finetune_steps=10",
    "task.steps_per_chunk=5",
    "task.batch_size=8",
    "task.finetune_examples=16",
    "task.max_test_examples=20",
    "task.sharpness_examples=4",
    "num_seeds=2",
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The override that names a checkpoint: the golden one's first block, quick to compile."""
    folder = tmp_path_factory.mktemp("vit")
    whole = pretrained_vit(GOLDEN)
    params = whole.load_pretrained()
    del params["block_1"]
    save_pretrained(folder, whole.clone(depth=1), params)
    return f"model.pretrained={folder}"


def task_of(*overrides):
    overrides = [f"++{each}" if "." in each else each for each in (*SMALL, *overrides)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=overrides)
    return build(OmegaConf.to_container(config.task, resolve=True), "task")


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs the command line in a folder of its own; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "1")  # leave the settings of the test process

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        try:
            run.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


@pytest.mark.slow
def test_fine_tuning_of_a_checkpoint(pretrained, call, capsys):
    """Without pre-training of its own, to the end; frozen parts stay, as weight decay is on."""
    overrides = (pretrained, "model.frozen_blocks=0", "task.pretrain_steps=0", "task.only=[tram]")
    assert call(*SMALL, *overrides, "hydra.run.dir=run") == 0
    assert "memory estimate: " in capsys.readouterr().out
    result = json.loads(Path("run/summary.json").read_text())["result"]
    assert list(result) == ["tram"]
    assert Path("run/plots/learning_curves.png").stat().st_size > 0

    (stage,) = task_of(*overrides).stages()
    model, shapes = stage.model, stage.shapes()
    assert isinstance(model, PretrainedViT)
    trained = Checkpoints(Path("run/checkpoints/tram"), 2).restore(shapes).params
    heads = trained.pop("head")["kernel"]  # one a seed
    assert not np.any(heads[0] == heads[1])
    loaded = model.load_pretrained()
    for seed in (0, 1):
        moved = jax.tree.map(
            lambda old, new, seed=seed: not np.array_equal(old, new[seed]), loaded, trained
        )
        assert moved == model.trainable(loaded)
        # Ten steps of rate 1e-3: still near the checkpoint.
        jax.tree.map(
            lambda old, new, seed=seed: np.testing.assert_allclose(old, new[seed], atol=0.02),
            loaded,
            trained,
        )


@pytest.mark.table
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.pretrained=/nowhere", "pretrained must be a folder or a hub id owner/name"),
        (f"model.pretrained={GOLDEN.parent}", "config.json must be a JSON file"),
        ("model.frozen_blocks=2", "frozen_blocks must be <= 1, got 2"),
        ("model.image_size=9", "image_size must be a positive multiple"),
        ("model.pretraind=x", "pretraind: unknown key"),
    ],
)
def test_wrong_models_end_with_one_line(override, message, pretrained, call, capsys):
    folder = () if override.startswith("model.pretrained=") else (pretrained,)
    assert call(*SMALL, *folder, override) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_weights_that_are_not_finite_end_with_one_line(pretrained, call, capsys):
    """They are read when the first stage starts, not before."""
    folder = shutil.copytree(pretrained.removeprefix("model.pretrained="), "checkpoint")
    tensors = load_file(folder + "/model.safetensors")
    tensors["layernorm.bias"][0] = np.nan
    save_file(tensors, folder + "/model.safetensors")
    overrides = (f"++model.pretrained={folder}", "task.pretrain_steps=0", "task.only=[tram]")
    assert call(*SMALL, *overrides) == 2
    error = capsys.readouterr().err
    assert "task: checkpoint/model.safetensors: tensor 'layernorm.bias' is not finite" in error
    assert len(error.splitlines()) == 1


def test_images_that_cannot_be_read_end_with_one_line(call, capsys):
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(buffer, "PNG")
    table = pyarrow.table({"image": [buffer.getvalue()], "label": [0]})
    parquet.write_table(table, "train-00000-of-00001.parquet")
    assert call(*SMALL, "data=folder", "data.path=.") == 2
    error = capsys.readouterr().err
    assert "row 0, column 'image': image mode RGBA" in error
    assert len(error.splitlines()) == 1


def test_without_pre_training_its_examples_are_fine_tuned_on():
    both, one = task_of(), task_of("task.pretrain_steps=0")
    assert len(one._rows["finetune"]) == len(both._rows["finetune"]) + len(both._rows["pretrain"])
    np.testing.assert_array_equal(one._rows["test"], both._rows["test"])


@pytest.mark.parametrize("model", ["vit_tiny", "vit_pretrained"])
def test_model_configs(model, pretrained):
    """Both take the checkpoint's architecture and the arguments of fine-tuning."""
    task = task_of(f"model={model}", pretrained, "model.image_size=8", "model.frozen_blocks=0")
    network = task.model(num_classes=3, dtype=jnp.bfloat16)
    folder = pretrained.removeprefix("model.pretrained=")
    expected = pretrained_vit(folder, 3, image_size=8, frozen_blocks=0, dtype=jnp.bfloat16)
    assert network == expected


def test_setting_of_the_paper():
    """Every method steps by SGD at the paper's rate; the checkpoint is the pre-training."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=["+exp=tram_vit"])
    task = build(OmegaConf.to_container(config.task, resolve=True), "task")
    task.validate()
    assert task.pretrain_steps == 0
    assert list(task.methods) == ["sgd", "sam", "asam", "tram", "tram_initial", "tram_noise",
                                  "tram_fisher"]  # fmt: skip
    assert {method.optimizer.base.func for method in task.methods.values()} == {optax.sgd}
    assert {method.learning_rate for method in task.methods.values()} == {5e-4}
