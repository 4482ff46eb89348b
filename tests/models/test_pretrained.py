"""Checkpoints of Hugging Face's ViT: what they compute, that they come back, what is refused.

tests/golden/make_vit.py made the checkpoints and the numbers with transformers.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from trustjax.models import (
    CheckpointError,
    Preprocessing,
    ViT,
    build_vit,
    interpolate_positions,
    pretrained_vit,
    save_pretrained,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "vit"
OUTPUTS = json.loads((GOLDEN / "outputs.json").read_text(encoding="utf-8"))
CLASSIFIER = GOLDEN / "classifier"
# The folder, the dtype of its tensors, its channels.
CASES = [("classifier", "float32", 3), ("pooler_bfloat16", "bfloat16", 3),
         ("sharded_float16", "float16", 1)]  # fmt: skip
each_case = pytest.mark.parametrize(("case", "dtype", "channels"), CASES)
VariablesOf = Callable[..., Any]


def images(batch: int, height: int, width: int, channels: int) -> np.ndarray:
    """As tests/golden/make_vit.py makes them."""
    values = np.sin(np.arange(batch * height * width * channels, dtype=np.float64) ** 1.5)
    return (0.5 + 0.5 * values).reshape(batch, height, width, channels).astype(np.float32)


KEY = jax.random.key(0)


# Numbers


@each_case
def test_outputs_and_hidden_states(case: str, dtype: str, channels: int) -> None:
    """With a head, with a pooler, with neither; they differ in epsilon, biases and dtype too."""
    golden = OUTPUTS[case]
    model = pretrained_vit(GOLDEN / case)

    @jax.jit
    def apply(params: Any, pixels: jax.Array) -> Any:
        return model.apply(
            {"params": params}, pixels, capture_intermediates=True, mutable=["intermediates"]
        )

    out, captured = apply(model.load_pretrained(), images(2, 16, 16, channels))
    tokens = {name: value["__call__"][0] for name, value in captured["intermediates"].items()
              if name != "__call__"}  # fmt: skip
    for index, expected in enumerate(golden["hidden_states"][1:]):
        np.testing.assert_allclose(tokens[f"block_{index}"][:, [0, 5]], expected, atol=1e-4)
    if "last_hidden_state" in golden:
        expected = golden["last_hidden_state"]
        np.testing.assert_allclose(tokens["final_norm"][:, [0, 5]], expected, atol=1e-4)
    # Without a head the logits are the features: the pooler's, else those of the class token.
    expected = golden.get("logits") or golden.get("pooler_output")
    if expected is None:
        expected = np.array(golden["last_hidden_state"])[:, 0]
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("size", ["8x8", "12x20"])
def test_other_image_sizes(size: str) -> None:
    """Smaller, and not square; larger follows."""
    height, width = map(int, size.split("x"))
    model = pretrained_vit(CLASSIFIER)
    assert isinstance(model.preprocess, Preprocessing)
    model = model.clone(preprocess=dataclasses.replace(model.preprocess, size=(height, width)))
    logits = jax.jit(model.apply)({"params": model.load_pretrained()}, images(2, height, width, 3))
    np.testing.assert_allclose(logits, OUTPUTS["interpolated"][size], atol=1e-4)


def test_image_size_argument() -> None:
    model = pretrained_vit(CLASSIFIER, image_size=24)
    params = model.load_pretrained()
    assert params["position_embedding"].shape == (1, 37, 32)
    logits = jax.jit(model.apply)({"params": params}, images(2, 24, 24, 3))
    np.testing.assert_allclose(logits, OUTPUTS["interpolated"]["24x24"], atol=1e-4)


def test_positions_must_be_of_a_square() -> None:
    with pytest.raises(ValueError, match=r"a square number of embeddings, got shape \(1, 9, 4\)"):
        interpolate_positions(np.zeros((1, 9, 4), np.float32), (2, 2))


def test_same_grid_keeps_the_bits() -> None:
    positions = np.random.default_rng(0).random((1, 10, 4), np.float32)
    assert interpolate_positions(positions, (3, 3)) is positions


# Images


@pytest.mark.parametrize("size", OUTPUTS["preprocessed"])
def test_preprocessing_is_that_of_the_image_processor(size: str) -> None:
    """Which rounds to 8 bits after each of two passes: 1/255, times two by the normalisation."""
    height, width = map(int, size.split("x"))
    preprocess = Preprocessing((16, 16), 3, (0.5,) * 3, (0.5,) * 3)
    pixels = np.round(255 * images(1, height, width, 3)) / np.float32(255)
    np.testing.assert_allclose(
        preprocess(jnp.asarray(pixels))[0], OUTPUTS["preprocessed"][size], atol=2 / 255 + 1e-4
    )


def test_grey_is_repeated_and_channels_have_their_own_numbers() -> None:
    preprocess = Preprocessing((2, 2), 3, (0.0, 0.5, 1.0), (1.0, 0.5, 2.0))
    out = preprocess(jnp.full((1, 2, 2, 1), 0.25))
    np.testing.assert_allclose(out[0, 0, 0], [0.25, -0.5, -0.375])


@pytest.mark.parametrize("shape", [(1, 8, 8, 2), (8, 8, 3)])
def test_images_that_do_not_fit(shape: tuple[int, ...]) -> None:
    preprocess = Preprocessing((2, 2), 3, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="with 1 or 3 channels, got shape"):
        preprocess(jnp.zeros(shape))


def test_normalization_of_the_folder(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    entries = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(entries))
    preprocess = pretrained_vit(folder).preprocess
    assert preprocess == Preprocessing((16, 16), 3, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


# Fine-tuning


def test_new_head() -> None:
    """For another number of classes: the head is not loaded, all else is."""
    model = pretrained_vit(CLASSIFIER, 7)
    assert model.num_classes == 7
    loaded, whole = model.load_pretrained(), pretrained_vit(CLASSIFIER).load_pretrained()
    assert loaded.keys() == whole.keys() - {"head"}
    new = jax.eval_shape(model.init, KEY, images(1, 8, 8, 1))["params"]
    shapes = jax.tree.map(np.shape, {**new, **loaded})
    assert shapes == jax.tree.map(np.shape, new)


def test_head_for_the_same_classes_is_kept() -> None:
    head = pretrained_vit(CLASSIFIER, 5).load_pretrained()["head"]
    classifier = load_file(CLASSIFIER / "model.safetensors")["classifier.weight"]
    np.testing.assert_array_equal(head["kernel"], classifier.T)


def test_the_pooler_goes_with_the_pre_training() -> None:
    folder = GOLDEN / "pooler_bfloat16"
    assert pretrained_vit(folder).representation_width == 32
    model = pretrained_vit(folder, 7)
    assert model.representation_width is None
    assert not {"head", "representation"} & model.load_pretrained().keys()


def test_training_arguments() -> None:
    model = pretrained_vit(CLASSIFIER, dropout=0.1, frozen_blocks=1, dtype=jnp.bfloat16)
    assert (model.dropout, model.frozen_blocks, model.dtype) == (0.1, 1, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.load_pretrained())} == {
        np.dtype("float32")
    }


def test_build_vit() -> None:
    sizes = {"patch_size": 2, "width": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 3,
             "dropout": 0.1, "pool": "mean", "layer_norm_epsilon": 1e-3, "dtype": jnp.bfloat16,
             "frozen_blocks": 1}  # fmt: skip
    assert build_vit(3, **sizes) == ViT(3, **sizes)
    checkpoint = build_vit(3, **sizes | {"pretrained": str(CLASSIFIER), "image_size": 8})
    expected = pretrained_vit(
        CLASSIFIER, 3, image_size=8, dropout=0.1, dtype=jnp.bfloat16, frozen_blocks=1
    )
    assert checkpoint == expected
    with pytest.raises(ValueError, match="image_size must be null without pretrained, got 8"):
        build_vit(3, **sizes | {"image_size": 8})


# Writing


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@each_case
def test_round_trip_keeps_the_bits(case: str, dtype: str, channels: int, tmp_path: Path) -> None:
    model = pretrained_vit(GOLDEN / case)
    save_pretrained(tmp_path / "a" / "b", model, model.load_pretrained(), dtype=dtype)
    written, read = tensors_of(tmp_path / "a" / "b"), tensors_of(GOLDEN / case)
    assert written.keys() == read.keys()
    for name, tensor in read.items():
        assert written[name].dtype == tensor.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert pretrained_vit(tmp_path / "a" / "b").clone(folder=model.folder) == model
    # transformers knows the file by this, and these keys of its config mean the same.
    with safe_open(tmp_path / "a" / "b" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    configs = [json.loads((folder / "config.json").read_text()) for folder in
               (tmp_path / "a" / "b", GOLDEN / case)]  # fmt: skip
    labels = ("id2label", "label2id")  # their names are not kept
    for key in configs[0].keys() - set(labels):
        assert configs[0][key] == configs[1][key], key
    assert [len(config.get("id2label", ())) for config in configs] == [model.num_classes] * 2


def test_a_vit_of_our_own(variables_of: VariablesOf, tmp_path: Path) -> None:
    """Trained on images as they are, so that is what its checkpoint does."""
    pixels = images(2, 8, 8, 2)
    model = ViT(3, patch_size=4, width=12, depth=1, num_heads=3, mlp_ratio=1.5)
    variables = variables_of(model, pixels)
    save_pretrained(tmp_path, model, variables["params"])
    again = pretrained_vit(tmp_path)
    assert again.preprocess == Preprocessing((8, 8), 2, (0.0, 0.0), (1.0, 1.0))
    params = again.load_pretrained()
    jax.tree.map(np.testing.assert_array_equal, params, variables["params"])
    logits = jax.jit(again.apply)({"params": params}, pixels)
    np.testing.assert_array_equal(logits, jax.jit(model.apply)(variables, pixels))


def test_saving_replaces_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pretrained_vit(CLASSIFIER)
    params = model.load_pretrained()
    save_pretrained(tmp_path, model, params)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors", "preprocessor_config.json"}

    def breaks(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", breaks)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tmp_path, model, jax.tree.map(lambda leaf: leaf + 1, params))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_models_that_cannot_be_saved(variables_of: VariablesOf, tmp_path: Path) -> None:
    fields = {"num_classes": 3, "patch_size": 4, "width": 12, "depth": 1, "num_heads": 3}
    model = ViT(**fields)
    params = variables_of(model, images(1, 8, 8, 1))["params"]

    with pytest.raises(ValueError, match=r"dtype must be one of 'float32', .* got 'float64'"):
        save_pretrained(tmp_path, model, params, dtype="float64")
    with pytest.raises(ValueError, match="pool must be one of 'cls', got 'mean'"):
        save_pretrained(tmp_path, ViT(**fields, pool="mean"), params)
    with pytest.raises(ValueError, match="representation_width must be None beside a head"):
        save_pretrained(tmp_path, ViT(**fields, representation_width=4), params)
    wide = variables_of(model, images(1, 4, 8, 1))["params"]
    with pytest.raises(ValueError, match="for square images, got 2 patches"):
        save_pretrained(tmp_path, model, wide)
    two_seeds = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), params)
    with pytest.raises(ValueError, match=r"attention_norm/bias must have shape \(12,\), got"):
        save_pretrained(tmp_path, model, two_seeds)
    with pytest.raises(ValueError, match="params must be the model's: no position_embedding"):
        save_pretrained(tmp_path, model, {"head": params["head"]})
    params["head"]["more"] = params["head"]["bias"]
    with pytest.raises(ValueError, match=r"head/more must have shape None, got \(3,\)"):
        save_pretrained(tmp_path, model, params)
    assert not list(tmp_path.iterdir())


# What is refused


def copy(tmp_path: Path, case: str = "classifier") -> Path:
    return Path(shutil.copytree(GOLDEN / case, tmp_path / case))


def change_config(changes: Mapping[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def change_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_in_half(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


BIAS = "vit.encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config({"model_type": "deit"}), "model_type must be 'vit', got 'deit'"),
        (change_config({"hidden_act": "gelu_new"}), "hidden_act must be 'gelu', got 'gelu_new'"),
        (change_config({"hidden_size": "32"}), "hidden_size must be int above 0, got '32'"),
        (change_config({"patch_size": 0}), "patch_size must be int above 0, got 0"),
        (change_config({"image_size": [16, 8]}), r"image_size must be int above 0, got \[16, 8\]"),
        (change_config({"qkv_bias": 1}), "qkv_bias must be bool, got 1"),
        (change_config({"num_hidden_layers": True}), "num_hidden_layers must be int above 0"),
        (change_config({"num_attention_heads": 5}), "config.json: width must be a multiple of"),
        (change_config({"image_size": 18}), "config.json: patch_size must divide the image"),
        (change_config({"id2label": {"0": "a"}}),
         r"model.safetensors: tensor 'classifier.weight' must have shape \(1, 32\), got \(5, 32\)"),
        (change_config({"intermediate_size": 64}),
         r"tensor 'vit.encoder.layer.0.intermediate.dense.bias' must have shape \(64,\), "
         r"got \(48,\).*; and 3 more"),
        (change_config({"num_hidden_layers": 3}),
         r"tensor 'vit.encoder.layer.2.[\w.]+' of shape \(32,\) is missing"),
        (change_config({"num_hidden_layers": 1}),
         r"tensor 'vit.encoder.layer.1.[\w.]+' of shape \(32,\) belongs to no part of this ViT"),
        (change_tensors(lambda t: t.pop(BIAS)), rf"tensor '{BIAS}' of shape \(32,\) is missing"),
        (change_tensors(lambda t: t.update({"vit.embeddings.mask_token": t[BIAS]})),
         "tensor 'vit.embeddings.mask_token' of shape .* belongs to no part of this ViT"),
        (change_tensors(lambda t: t.update({BIAS: t[BIAS][:5].copy()})),
         rf"model.safetensors: tensor '{BIAS}' must have shape \(32,\), got \(5,\)"),
        (change_tensors(lambda t: t.update({BIAS: t[BIAS].astype(np.int32)})),
         rf"tensor '{BIAS}' must be F32, BF16, F16, got I32"),
        (only_a_pickle, "must hold model.safetensors or .*; pytorch_model.bin is not read"),
        (cut_in_half, "model.safetensors must be a whole safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), "json must be a JSON file"),
        (lambda folder: (folder / "config.json").write_text("{"), "json must be a JSON file"),
        (lambda folder: (folder / "config.json").write_text("[]"),
         "config.json must be a JSON object, got list"),
        (lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}'),
         r"preprocessor_config.json: image_mean must be 3 numbers, got \[0.5\]"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(
    change: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    folder = copy(tmp_path)
    change(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        pretrained_vit(folder)
    assert str(error.value).startswith(str(folder))


def test_activation_of_the_pooler(tmp_path: Path) -> None:
    folder = copy(tmp_path, "pooler_bfloat16")
    change_config({"pooler_act": "relu"})(folder)
    with pytest.raises(CheckpointError, match="pooler_act must be 'tanh', got 'relu'"):
        pretrained_vit(folder)


@pytest.mark.parametrize("name", ["../model-00001-of-00002.safetensors", 3])
def test_shards_stay_in_the_folder(name: Any, tmp_path: Path) -> None:
    folder = copy(tmp_path, "sharded_float16")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["layernorm.bias"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="weight_map must give tensors file names"):
        pretrained_vit(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = copy(tmp_path, "sharded_float16")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors must be a whole"):
        pretrained_vit(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"image_size": 18}, "image_size must be a positive multiple of .* 4, got 18"),
        ({"image_size": 0}, "image_size must be a positive multiple of .* 4, got 0"),
        ({"frozen_blocks": 3}, "frozen_blocks must be <= 2, got 3"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained_vit(CLASSIFIER, **arguments)


# The hub


def test_hub_id_is_downloaded_without_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "someone/some-vit"
        assert all("bin" not in pattern for pattern in allow_patterns)
        return str(CLASSIFIER)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert pretrained_vit("someone/some-vit") == pretrained_vit(CLASSIFIER)


def test_hub_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"no folder 'someone/vit' here.*no network"):
        pretrained_vit("someone/vit")


def test_neither_a_folder_nor_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match="pretrained must be a folder or a hub id"):
        pretrained_vit("/nowhere/at/all")


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "trustjax\[experiments\]"'):
        pretrained_vit(CLASSIFIER if package == "safetensors" else "someone/vit")


# Against transformers itself: the crosscheck extra


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", [True, False])
def test_transformers_computes_the_same(head: bool, tmp_path: Path) -> None:
    """Both ways: we read what it writes, and it reads what we write."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(int(head))
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40,
        image_size=12, patch_size=3, num_labels=4, qkv_bias=head, layer_norm_eps=1e-3,
    )  # fmt: skip
    kind = transformers.ViTForImageClassification if head else transformers.ViTModel
    theirs = kind(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")

    model = pretrained_vit(tmp_path / "theirs")
    params = model.load_pretrained()
    save_pretrained(tmp_path / "ours", model, params)
    again, loading = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    pixels = images(2, 12, 12, 3)
    logits = jax.jit(model.apply)({"params": params}, pixels)
    with torch.no_grad():
        inputs = torch.from_numpy((pixels - 0.5) / 0.5).permute(0, 3, 1, 2)
        for network in (theirs, again.eval()):
            out = network(inputs)
            expected = out.logits if head else out.pooler_output
            np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert list(processor.image_mean) == [0.5] * 3
    assert dict(processor.size) == {"height": 12, "width": 12}
