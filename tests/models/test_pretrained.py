"""Checkpoints of Hugging Face's ViT: what they compute, that they come back, what is refused.

tests/golden/make_vit.py made the checkpoints and the numbers with transformers.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changing import change_config, change_tensors
from PIL import Image
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


def pixels_in(folder: Path, pixels: np.ndarray) -> np.ndarray:
    preprocess = pretrained_vit(folder).preprocess
    assert isinstance(preprocess, Preprocessing)
    return np.asarray(preprocess(jnp.asarray(pixels)))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, lambda x: (x / 255 - 0.5) / 0.5),
        ({"do_rescale": True, "rescale_factor": None}, lambda x: (x / 255 - 0.5) / 0.5),
        ({"do_normalize": False}, lambda x: x / 255),
        ({"do_rescale": False, "do_normalize": False}, lambda x: x),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [63.75] * 3},
         lambda x: (x - 127.5) / 63.75),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1] * 3},
         lambda x: x / 127.5 - 1),
        ({"do_normalize": False, "image_std": [0.0] * 3}, lambda x: x / 255),
    ],
)  # fmt: skip
def test_pixels_are_what_the_image_processor_makes(
    entries: dict[str, Any], expected: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    """(factor * pixels - mean) / std, on pixels 0..255, given as uint8 or in [0, 1]."""
    folder = copy(tmp_path)
    preprocessor(entries)(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for given in (pixels, pixels.astype(np.float32) / 255):
        found = pixels_in(folder, given)
        np.testing.assert_allclose(found, expected(pixels.astype(float)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_resizing_is_that_of_pillow(resample: int, tmp_path: Path) -> None:
    """Which rounds to 8 bits after each of two passes."""
    folder = copy(tmp_path)
    preprocessor({"resample": resample, "do_normalize": False, "size": 16})(folder)
    for height, width in ((40, 9), (5, 33), (16, 7)):
        # Not so far apart that Pillow would clip between its two passes.
        pixels = np.random.default_rng(height).integers(80, 176, (1, height, width, 3), np.uint8)
        expected = Image.fromarray(pixels[0]).resize((16, 16), resample)
        found = pixels_in(folder, pixels)[0]
        np.testing.assert_allclose(255 * found, np.asarray(expected), atol=1.51)
    save_pretrained(
        tmp_path / "again", pretrained_vit(folder), pretrained_vit(folder).load_pretrained()
    )
    assert pretrained_vit(tmp_path / "again").preprocess == pretrained_vit(folder).preprocess


def test_a_checkpoint_that_does_not_resize(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    preprocessor({"do_resize": False, "size": {"shortest_edge": 8}})(folder)
    assert pixels_in(folder, np.zeros((1, 16, 16, 1), np.uint8)).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match=r"images must be 16 x 16, .*, got 16 x 8"):
        pixels_in(folder, np.zeros((1, 16, 8, 3), np.uint8))


def test_integer_images_are_bytes() -> None:
    """Of a whole network too; other integers have no known range."""
    model = pretrained_vit(CLASSIFIER)
    params = model.load_pretrained()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    apply = jax.jit(lambda x: model.apply({"params": params}, x))
    np.testing.assert_allclose(apply(pixels), apply(pixels.astype(np.float32) / 255), atol=1e-5)
    for dtype in (np.int32, np.uint16, bool):
        with pytest.raises(ValueError, match=r"images must be floats in \[0, 1\], or uint8 0..255"):
            apply(pixels.astype(dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5,)}, r"mean must be 3 finite float32 numbers, got \(0.5,\)"),
        ({"mean": (0.0, 0.0, math.nan)}, "mean must be 3 finite float32 numbers"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be 3 finite float32 numbers above 0, got"),
        ({"std": (1.0, 1.0, -1.0)}, "std must be 3 finite float32 numbers above 0, got"),
        ({"std": (1.0, 1.0, math.inf)}, "std must be 3 finite float32 numbers above 0, got"),
        ({"method": "area"}, "method must be one of 'nearest', 'linear'"),
    ],
)
def test_wrong_preprocessing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Preprocessing((2, 2), 3, (0.5,) * 3, (0.5,) * 3), **changes)


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


def test_params_that_cannot_be_saved_in_the_dtype(tmp_path: Path) -> None:
    model = pretrained_vit(CLASSIFIER)
    for value, dtype in ((math.nan, "float32"), (math.inf, "bfloat16"), (1e5, "float16")):
        params = model.load_pretrained()
        params["head"]["bias"] = np.full(5, value, np.float32)
        with pytest.raises(ValueError, match=f"params must be finite in {dtype}: head/bias is not"):
            save_pretrained(tmp_path, model, params, dtype=dtype)
    params["head"]["bias"] = np.zeros(5, np.complex64)
    with pytest.raises(ValueError, match="params must be floats, but head/bias is complex64"):
        save_pretrained(tmp_path, model, params)
    assert not list(tmp_path.iterdir())


# What is refused


def copy(tmp_path: Path, case: str = "classifier") -> Path:
    return Path(shutil.copytree(GOLDEN / case, tmp_path / case))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_in_half(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def preprocessor(entries: Mapping[str, Any]) -> Callable[[Path], Any]:
    """Writes it to a folder."""
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps(entries))


def folder_instead(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


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
        (change_config({"num_attention_heads": 5}),
         "config.json: num_attention_heads must be a divisor of hidden_size = 32, got 5"),
        (change_config({"num_attention_heads": 2**31}), "num_attention_heads must be a divisor"),
        # Compared with the tensors before anything is built: these would take for ever.
        (change_config({"num_hidden_layers": 2**31}),
         "config.json: num_hidden_layers must be 2, as in the tensors, got 2147483648"),
        (change_config({"hidden_size": 2**31}), "config.json: hidden_size must be 32, as in"),
        (change_config({"hidden_size": 10**1000}), r"hidden_size must be 32, .* got 10000.*\.\.\."),
        (change_config({"image_size": 2**62}), "config.json: image_size must be 16, as in"),
        (change_config({"image_size": 18}), "config.json: image_size must be 16, as in .* got 18"),
        (change_config({"patch_size": 2}), "config.json: patch_size must be 4, as in"),
        (change_config({"num_channels": 1}), "config.json: num_channels must be 3, as in"),
        (change_config({"num_hidden_layers": 3}), "num_hidden_layers must be 2, as in"),
        (change_config({"num_hidden_layers": 1}), "num_hidden_layers must be 2, as in"),
        (change_config({"num_hidden_layers": -1}), "num_hidden_layers must be int above 0, got -1"),
        (change_config({"num_hidden_layers": 2.0}), "num_hidden_layers must be int above 0"),
        (change_config({"intermediate_size": 64}), "intermediate_size must be 48, as in .* got 64"),
        (change_config({"qkv_bias": False}), "qkv_bias must be True, as in the tensors, got False"),
        (change_config({"id2label": {"0": "a"}}), r"len\(id2label\) must be 5, as in .* got 1"),
        (change_config({"id2label": "abcde"}), "id2label must be an object, got 'abcde'"),
        (change_config({"id2label": None}), "config.json: num_labels must be 5, as in .* got 2"),
        (change_config({"id2label": {}, "num_labels": "5"}), "num_labels must be int above 0"),
        *((change_config({"layer_norm_eps": value}), "layer_norm_eps must be a float32 above 0")
          for value in (0, -1e-6, math.nan, math.inf, "1e-6", True, 10**400, 1e-300)),
        (change_config({"hidden_act": ["gelu"]}), r"hidden_act must be str, got \['gelu'\]"),
        (change_config({"model_type": "a\nb", "architectures": "c\nd" * 999}), "model_type must"),
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
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "must be a JSON file"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{}"), "must be a JSON file"),
        (folder_instead("config.json"), "json must be a JSON file: it is a folder or a device"),
        (folder_instead("preprocessor_config.json"), "json must be a JSON file: it is a folder"),
        (folder_instead("model.safetensors"), "must hold model.safetensors or"),
        (lambda folder: (folder / "preprocessor_config.json").symlink_to("nothing"),
         "preprocessor_config.json must be a JSON file: no such file"),
        (lambda folder: os.mkfifo(folder / "preprocessor_config.json"), "must be a JSON file"),
        (preprocessor({"image_mean": [0.5]}),
         r"preprocessor_config.json: image_mean must be 3 numbers, got \[0.5\]"),
        (preprocessor({"image_mean": 0.5}), "image_mean must be 3 numbers, got 0.5"),
        (preprocessor({"image_mean": [0.5, 0.5, True]}), "image_mean must be 3 numbers, got"),
        (preprocessor({"image_mean": [0.5, 0.5, 10**400]}), "image_mean must be 3 numbers, got"),
        *((preprocessor({"image_std": [0.5, 0.5, value]}), "image_std must be 3 numbers above 0")
          for value in (0, -1, math.nan, math.inf, 1e-300, "1")),
        *((preprocessor({"rescale_factor": value}), "rescale_factor must be a float32 above 0, got")
          for value in (0, -1, math.nan, math.inf, "1", [1], 10**400, False)),
        (preprocessor({"rescale_factor": 1e-37, "image_mean": [1e20] * 3}),
         "rescale_factor, image_mean, image_std: mean must be 3 finite float32 numbers"),
        *((preprocessor({name: "no"}), f"{name} must be true or false, got 'no'")
          for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad")),
        (preprocessor({"do_center_crop": True}), "do_center_crop must be false, got True"),
        *((preprocessor({"resample": value}), r"resample must be one of 0 \(nearest\), 1")
          for value in (4, 5, -1, 2.0, True, "bilinear", [2])),
        *((preprocessor({"size": value}), "size must be 16 x 16, image_size in config.json, got")
          for value in (8, {"height": 16, "width": 8}, {"shortest_edge": 16}, "16", [16, 16])),
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
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def with_header(header: Mapping[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 7, (2**42).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}",
        with_header({"a": entry([2], 0, 8)}),  # no data
        with_header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),  # they overlap
        with_header({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)),  # a hole
        with_header({"a": entry([3], 0, 8)}, bytes(8)),
        with_header({"a": entry([2], 0, 8, "F16")}, bytes(8)),
        with_header({"a": entry([2], 0, 8, "F99")}, bytes(8)),
        with_header({"a": entry([2**40], 0, 2**42)}),
        with_header({"a": entry([2**62, 2**62], 0, 8)}, bytes(8)),
        with_header({"a": entry([-2], 0, 8)}, bytes(8)),
        with_header({"a": entry([2], 8, 0)}, bytes(8)),
        with_header({"a": 3}), with_header({"__metadata__": {"a": 3}}),
        b"\x04\0\0\0\0\0\0\0[[[[", b"\x02\0\0\0\0\0\0\0[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)  # fmt: skip
def test_damaged_safetensors(content: bytes, tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors must be a whole") as error:
        pretrained_vit(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vit.embeddings.position_embeddings", (0, 17, 32), "must have 3 axes, none of length 0"),
        ("vit.embeddings.position_embeddings", (17, 32), "must have 3 axes"),
        ("vit.embeddings.position_embeddings", (1, 18, 32), r"must have shape \(1, 17, 32\)"),
        ("classifier.weight", (160,), "must have 2 axes"),
        ("vit.encoder.layer.0.intermediate.dense.weight", (), "must have 2 axes"),
        ("vit.embeddings.cls_token", (32,), r"must have shape \(1, 1, 32\), got \(32,\)"),
    ],
)
def test_shapes_that_cannot_be(
    name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    folder = copy(tmp_path)
    change_tensors(lambda t: t.update({name: np.zeros(shape, np.float32)}))(folder)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' {message}"):
        pretrained_vit(folder)


def test_large_sizes_are_not_built(tmp_path: Path) -> None:
    """Of tensors without data the file may be small, and the shapes huge."""
    folder = copy(tmp_path)
    name = "vit.embeddings.position_embeddings"
    change_tensors(lambda t: t.update({name: np.zeros((0, 2**40 + 1, 32), np.float32)}))(folder)
    change_config({"image_size": 4 * 2**20})(folder)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' must have 3 axes, none of length"):
        pretrained_vit(folder)


@each_case
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_must_be_finite(
    value: float, case: str, dtype: str, channels: int, tmp_path: Path
) -> None:
    folder = copy(tmp_path, case)
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = max(name for name in tensors if name.endswith("weight"))
    tensors[name].flat[-1] = value
    save_file(tensors, file)
    model = pretrained_vit(folder)
    with pytest.raises(CheckpointError, match=f"{file}: tensor '{name}' is not finite"):
        model.load_pretrained()


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = copy(tmp_path, "sharded_float16")
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(first)
    name = min(tensors)
    save_file({**load_file(second), name: tensors[name] + 1}, second)
    with pytest.raises(CheckpointError, match=f"{second}: tensor '{name}' is in {first.name} too"):
        pretrained_vit(folder)


def test_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache holds a snapshot as links to its blobs."""
    (tmp_path / "links").mkdir()
    for file in CLASSIFIER.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert pretrained_vit(tmp_path / "links").clone(folder="") == pretrained_vit(CLASSIFIER).clone(
        folder=""
    )


def test_epsilon_given_as_an_int(tmp_path: Path) -> None:
    """JAX takes no int of 64 bits, but the float of that value."""
    folder = copy(tmp_path)
    change_config({"layer_norm_eps": 2**63})(folder)
    epsilon = pretrained_vit(folder).layer_norm_epsilon
    assert isinstance(epsilon, float)
    assert epsilon == 2.0**63


def test_activation_of_the_pooler(tmp_path: Path) -> None:
    folder = copy(tmp_path, "pooler_bfloat16")
    change_config({"pooler_act": "relu"})(folder)
    with pytest.raises(CheckpointError, match="pooler_act must be 'tanh', got 'relu'"):
        pretrained_vit(folder)


@pytest.mark.parametrize(
    "name",
    ["../model-00001-of-00002.safetensors", 3, "/etc/passwd", "..", "", "a\0.safetensors",
     "config.json", "sub/model.safetensors", ["a"], None, "model.safetensors\n"],
)  # fmt: skip
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
        ({"image_size": 16.0}, "image_size must be an int, got 16.0"),
        ({"image_size": "16"}, "image_size must be an int, got '16'"),
        ({"num_classes": 2.5}, "num_classes must be an int, got 2.5"),
        ({"num_classes": True}, "num_classes must be an int, got True"),
        ({"frozen_blocks": 3}, "frozen_blocks must be <= 2, got 3"),
        ({"frozen_blocks": 1.5}, "frozen_blocks must be an int, got 1.5"),
        ({"frozen_blocks": -1}, "frozen_blocks must be >= 0, got -1"),
        ({"dropout": -0.1}, "dropout must be >= 0, got -0.1"),
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


@pytest.mark.parametrize("given", ["/nowhere/at/all", 3, None, "", "a\0b", "~nobody-here/x"])
def test_neither_a_folder_nor_a_hub_id(given: Any) -> None:
    with pytest.raises(CheckpointError, match="pretrained must be a folder or a hub id"):
        pretrained_vit(given)


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
