"""Damaged ViT folders: a model with all its weights, or a CheckpointError of one line."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from guard import fuzz
from mutating import Random, damaged, edited

from trustjax.models import CheckpointError, pretrained_vit

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "vit"
CASES = ("classifier", "pooler_bfloat16", "sharded_float16")
PREPROCESSOR = {
    "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3, "do_center_crop": None,
}  # fmt: skip


def damage(random: Random, path: Path) -> None:
    """Of JSON and of the header of tensors a value or a byte; of the data, bytes."""
    content = path.read_bytes()
    if path.suffix == ".json":
        if random.integers(3):
            text = json.dumps(edited(random, json.loads(content)))
            path.write_text(text, encoding="utf-8")
        else:
            path.write_bytes(damaged(random, content))
        return
    end = 8 + int.from_bytes(content[:8], "little")
    match random.integers(5):
        case 0 | 1:
            header = json.dumps(edited(random, json.loads(content[8:end]))).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
        case 2:
            path.write_bytes(damaged(random, content[:8]) + content[8:])
        case 3:
            path.write_bytes(content[:8] + damaged(random, content[8:end]) + content[end:])
        case _:
            path.write_bytes(content[:end] + damaged(random, content[end:]))


def test_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"

    def attempt(seed: int) -> None:
        random = np.random.default_rng(seed)
        case = CASES[random.integers(3)]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in (GOLDEN / case).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        channels = 1 if case == "sharded_float16" else 3
        entries = PREPROCESSOR | {name: [0.5] * channels for name in ("image_mean", "image_std")}
        (folder / "preprocessor_config.json").write_text(json.dumps(entries))
        files = sorted(folder.iterdir())
        for index in random.permutation(len(files))[: random.integers(1, 3)]:
            if random.integers(40):
                damage(random, files[index])
            else:
                files[index].unlink()
                if random.integers(2):
                    files[index].mkdir()
        model = pretrained_vit(folder, None if random.integers(2) else 7)
        leaves = jax.tree.leaves(model.load_pretrained())
        assert leaves
        assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in leaves)

    fuzz("vit", tmp_path, attempt, (CheckpointError,))
