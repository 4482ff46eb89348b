"""Writes tests/golden/vit: tiny random checkpoints of transformers' ViT and what it computes.

Needs torch, transformers and pillow (made with torch 2.13.0, transformers 5.23.0):
    python tests/golden/make_vit.py
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

FOLDER = Path(__file__).parent / "vit"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}


def images(batch: int, height: int, width: int, channels: int) -> np.ndarray:
    """Images in [0, 1], float32 [batch, height, width, channels]; tests make the same."""
    values = np.sin(np.arange(batch * height * width * channels, dtype=np.float64) ** 1.5)
    return (0.5 + 0.5 * values).reshape(batch, height, width, channels).astype(np.float32)


def to_torch(pixels: np.ndarray) -> torch.Tensor:
    """As ViTImageProcessor normalises them: mean and standard deviation 0.5."""
    return torch.from_numpy((pixels - 0.5) / 0.5).permute(0, 3, 1, 2)


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """No parameter at a special value such as 0 or 1, or its place would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        around = 1.0 if "layernorm" in name and name.endswith("weight") else 0.0
        matrix = parameter.ndim > 1 and name.endswith("weight")
        scale = parameter[0].numel() ** -0.5 if matrix else 0.3
        parameter.data = around + scale * noise
    return model.eval()


def rounded(tensor: torch.Tensor) -> list:
    return tensor.double().numpy().round(6).tolist()


def outputs(folder: Path, kind: type, channels: int, **arguments: bool) -> dict[str, list]:
    """What the saved model computes in float32; of the tokens the class token and the fifth."""
    model = kind.from_pretrained(folder, dtype=torch.float32, **arguments).eval()
    with torch.no_grad():
        out = model(to_torch(images(2, 16, 16, channels)), output_hidden_states=True)
    found = {"hidden_states": [rounded(h[:, [0, 5]]) for h in out.hidden_states]}
    for name in ("logits", "pooler_output"):
        if getattr(out, name, None) is not None:
            found[name] = rounded(getattr(out, name))
    if "last_hidden_state" in out:
        found["last_hidden_state"] = rounded(out.last_hidden_state[:, [0, 5]])
    return found


def main() -> None:
    golden = {"origin": f"torch {torch.__version__}, transformers {transformers.__version__}"}

    folder = FOLDER / "classifier"
    labels = {index: f"label {index}" for index in range(5)}
    config = ViTConfig(**SIZES, id2label=labels, layer_norm_eps=1e-12)
    classifier = randomize(ViTForImageClassification(config), 0)
    classifier.save_pretrained(folder)
    golden["classifier"] = outputs(folder, ViTForImageClassification, 3)

    folder = FOLDER / "pooler_bfloat16"
    config = ViTConfig(**SIZES, layer_norm_eps=0.05)
    randomize(ViTModel(config), 1).to(torch.bfloat16).save_pretrained(folder)
    golden["pooler_bfloat16"] = outputs(folder, ViTModel, 3)

    folder = FOLDER / "sharded_float16"
    config = ViTConfig(**SIZES, layer_norm_eps=1e-6, qkv_bias=False, num_channels=1)
    model = randomize(ViTModel(config, add_pooling_layer=False), 2).to(torch.float16)
    model.save_pretrained(folder, max_shard_size="20KB")
    golden["sharded_float16"] = outputs(folder, ViTModel, 1, add_pooling_layer=False)

    golden["interpolated"] = {}
    for height, width in ((24, 24), (8, 8), (12, 20)):
        with torch.no_grad():
            pixels = to_torch(images(2, height, width, 3))
            out = classifier(pixels, interpolate_pos_encoding=True)
        golden["interpolated"][f"{height}x{width}"] = rounded(out.logits)

    golden["preprocessed"] = {}
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    for height, width in ((6, 10), (40, 28)):
        pixels = np.round(255 * images(1, height, width, 3)[0]).astype(np.uint8)
        out = processor(pixels, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        golden["preprocessed"][f"{height}x{width}"] = out.round(5).tolist()

    text = json.dumps(golden)
    (FOLDER / "outputs.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
