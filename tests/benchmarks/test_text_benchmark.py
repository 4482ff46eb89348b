"""The benchmark of language models runs, compares logits, and does without a peer."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import text
from trustjax.models import Decoder

TINY = text.Workload(
    Decoder(vocab_size=40, width=16, depth=1, num_heads=2, mlp_width=16),
    batch=8, time=4, prompts=8, prompt_time=3, new_tokens=2,
)  # fmt: skip


@pytest.mark.slow
def test_head() -> None:
    found = text.measure_head(1, tokens=600, vocab=9000)
    rows = found["rows"]
    assert rows["plain cross-entropy"]["times_less"] == 1
    assert rows["token_log_probs"]["times_less"] > 1.2
    assert rows["fused_cross_entropy"]["times_less"] > 1.2


def test_without_a_peer(tmp_path: Path) -> None:
    found = text.measure_model(TINY, tmp_path, repeats=1, threads=None)
    assert "build.sh" in found["missing"]
    assert found["devices"] == jax.device_count()
    assert found["rows"].keys() == {"forward", "train", "generate"}
    assert all(row["tokens_per_second"] > 0 for row in found["rows"].values())


def test_other_logits_are_an_error() -> None:
    tokens = text.tokens_of(8, 4, 40)
    logits, variables = jax.jit(TINY.model.init_with_output)(jax.random.key(0), jnp.asarray(tokens))
    params, logits = variables["params"], np.asarray(logits)[:, -1]
    text.check_agrees(TINY, params, {"logits": logits})
    with pytest.raises(RuntimeError, match="the peer has other logits"):
        text.check_agrees(TINY, params, {"logits": logits + 0.1})
