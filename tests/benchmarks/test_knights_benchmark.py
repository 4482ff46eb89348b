"""The benchmark of an iteration runs without a peer, and a peer would see the same tokens."""

from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import knights
from trustjax.data import pretrained_tokenizer

CONFIG, ENV = knights.workload(width=8, depth=1, num_prompts=2, num_samples=2, new_tokens=3)


@pytest.mark.slow
def test_without_a_peer(tmp_path: Path) -> None:
    found = knights.measure(CONFIG, ENV, tmp_path, repeats=1, threads=None)
    assert "build.sh" in found["missing"]
    rows = found["stages"]
    assert rows["iteration"]["share"] == 1
    expected = {"decode", "iteration", "log-probabilities", "loss and step", "prefill", "reward"}
    assert expected < rows.keys()
    assert "times_faster" not in found


def test_the_peer_gets_the_same_tokens(tmp_path: Path) -> None:
    shapes = jax.eval_shape(CONFIG.model.init, jax.random.key(0), CONFIG.prompts.tokens[:1])
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["params"])
    knights.write_model(str(tmp_path), CONFIG, ENV, params)
    tokenizer = pretrained_tokenizer(tmp_path)
    for row, mask in zip(CONFIG.prompts.tokens[:5], CONFIG.prompts.mask, strict=False):
        own = np.asarray(row)[np.asarray(mask)]
        assert tokenizer.encode(ENV.tokenizer.decode(own)) == own.tolist()
    assert tokenizer.stop_tokens == (0,)
