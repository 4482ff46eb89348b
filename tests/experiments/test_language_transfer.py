"""Transfer between genres of text: what is learned, masked, noised, held out, and reported."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_adaptation import train

from experiments.optimizers import Method, Optimizer
from experiments.penalties import FromReference
from experiments.tasks import language_report
from experiments.tasks.adaptation_measures import SCORES
from experiments.tasks.genres import Genres, python_genres
from experiments.tasks.language_model import LanguageModel, Network
from experiments.tasks.language_transfer import LanguageTransfer
from experiments.tasks.objectives import NextToken, apply_text, mean_loss
from experiments.tasks.supervised import TrainState, training_step
from trustjax._checks import FieldError
from trustjax.data import pack, word_tokenizer
from trustjax.losses import trpo_penalty
from trustjax.models import Decoder
from trustjax.optim import tram

METHODS = {
    "adamw": Method(Optimizer(optax.adamw), 3e-2),
    "tram": Method(Optimizer(optax.adamw, tram, {"scale": 1.0}), 3e-2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Genres in which every word has one successor: the target undoes the steps of the source."""
    path = tmp_path_factory.mktemp("genres")
    random = np.random.default_rng(0)
    for genre, step in {"up": 1, "down": -1, "skip": 2, "back": -1}.items():
        documents = []
        for _ in range(24):
            start = random.integers(10)
            documents.append(" ".join(f"w{(start + step * i) % 10}" for i in range(14)))
        (path / f"{genre}.txt").write_text("\n\n".join(documents))
    return path


def task_of(folder, **changes):
    fields = {
        "methods": METHODS,
        "seed": 0,
        "num_seeds": 2,
        "precision": "float32",
        "only": (),
        "pretrain_steps": 30,
        "pretrain_learning_rate": 3e-2,
        "finetune_steps": 30,
        "finetune_examples": 8,
        "batch_size": 8,
        "steps_per_chunk": 15,
        "input_noise": 0.1,
        "max_test_examples": 50,
        "sharpness_examples": 2,
        "text": Genres(path=str(folder), source=["up"], target=["down"]),
        "model": LanguageModel(width=8, depth=1, num_heads=2, mlp_width=8, vocab_size=20),
        "row_length": 8,
    }
    return LanguageTransfer(**fields | changes)


@pytest.fixture(scope="module")
def trained(folder):
    return train(task_of(folder))[0]


def test_it_adapts_and_forgets(folder, trained, tmp_path):
    """Fails with the gradient's sign flipped, with targets shifted, or tuned on the source."""
    task = task_of(folder)
    values, table = task.summarize(trained)
    before = {name: values["pretrain"][f"final/{name}"]["mean"] for name in ("target", "source")}
    assert before["source"] < 3 < 10 < before["target"]
    for name in METHODS:
        after = values[name]
        assert after["final/target"]["mean"] < 0.5 * before["target"]
        assert after["final/source"]["mean"] > 2 * before["source"]
        unseen = (after["final/skip"]["mean"] + after["final/back"]["mean"]) / 2
        assert after["final/unseen"]["mean"] == pytest.approx(unseen)
        # The genre that is like the target gains with it.
        assert after["final/back"]["mean"] < 0.5 * values["pretrain"]["final/back"]["mean"]
    assert values["correlation"]["back"]["with_pretrain"]["low"] > 0.9
    assert [row[0] for row in table.rows] == ["pretrain", *METHODS]
    task.plot(trained, tmp_path)
    figures = {"learning_curves", "gains", "target_and_unseen", "trust_radius", "time", "genres"}
    assert {path.stem for path in tmp_path.iterdir()} == figures


def test_documents_are_in_one_part_and_rows_in_no_two_domains(folder):
    task = task_of(folder)
    trained, tested = task._documents(["down"], "train"), task._documents(["down"], "test")
    assert len(trained) + len(tested) == 24 - len(task._documents(["down"], "validation"))
    rows = task._parts
    assert not {*rows["train"]} & {*rows["test"]} | {*rows["validation"]} & {*rows["test"]}
    held_out = task._held_out["tokens"]
    assert held_out.shape[0] == 4  # source, target, and two unseen
    search = task_of(folder, grid={name: {} for name in METHODS})
    assert search._held_out["tokens"].shape[0] == 1


RANDOM = np.random.default_rng(0)
MODEL = Decoder(11, 4, 0, 2, 4)
BATCH = pack([[1, 2, 3, 4, 5], [6, 7, 8], [9, 10]], 6).batch(np.arange(2))
PARAMS = jax.jit(MODEL.init)(jax.random.key(0), BATCH["tokens"])["params"]
NETWORK = Network(MODEL, word_tokenizer(["a"], 3), None, None, 1.0)


def by_hand(embedded):
    """Logits of a decoder without blocks: the norm of the embeddings and the tied head."""
    norm = embedded / np.sqrt((embedded**2).mean(-1, keepdims=True) + 1e-5)
    return norm * PARAMS["final_norm"]["scale"] @ PARAMS["token_embedding"]["embedding"].T


def test_noise_is_added_to_the_embeddings_of_tokens_alone():
    embedded = np.asarray(PARAMS["token_embedding"]["embedding"])[BATCH["tokens"]]
    clean = apply_text(MODEL, PARAMS, BATCH)
    np.testing.assert_allclose(clean, by_hand(embedded), rtol=1e-4, atol=1e-6)
    key = jax.random.key(3)
    noise = 0.5 * np.asarray(jax.random.normal(key, embedded.shape))
    noised = apply_text(MODEL, PARAMS, BATCH, noise_key=key, input_noise=0.5)
    np.testing.assert_allclose(noised, by_hand(embedded + noise), rtol=1e-3, atol=1e-6)


def test_loss_is_that_of_the_tokens_with_a_next_one():
    objective = NextToken(NETWORK)
    logits = np.asarray(apply_text(MODEL, PARAMS, BATCH))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, places = np.nonzero(BATCH["mask"])
    assert len(rows) == 4 + 2 + 1
    expected = -log_probs[rows, places, BATCH["targets"][rows, places]].mean()
    assert mean_loss(objective, logits, BATCH) == pytest.approx(expected, rel=1e-5)
    # Perplexity: e to the mean loss, and the number of words where all are equally likely.
    assert SCORES["perplexity"](objective, logits, BATCH) == pytest.approx(
        np.exp(expected), rel=1e-5
    )
    even = jnp.zeros_like(logits)
    assert SCORES["perplexity"](objective, even, BATCH) == pytest.approx(11, rel=1e-5)


def test_penalty_and_radius_are_means_over_the_same_tokens():
    """What stands where nothing is predicted changes neither loss, penalty, nor radius."""
    start = jax.tree.map(lambda x: x + 0.1, PARAMS)
    penalty = FromReference(trpo_penalty, 0.3, decay=1.0)
    tx = optax.chain(tram("initial"), optax.sgd(0.1))
    step = jax.jit(training_step(NextToken(NETWORK, 0.1), tx, penalty))
    state = TrainState(PARAMS, {}, tx.init(start), start, jnp.zeros([], jnp.int32))
    other = {**BATCH, "targets": np.where(BATCH["mask"], BATCH["targets"], 0)}
    found = [step(state, batch, jax.random.key(0)) for batch in (BATCH, other)]
    jax.tree.map(np.testing.assert_array_equal, *(metrics for _, metrics in found))
    jax.tree.map(np.testing.assert_array_equal, *(new.params for new, _ in found))
    logits, reference = (np.asarray(apply_text(MODEL, p, BATCH)) for p in (PARAMS, start))
    kl = np.asarray(trpo_penalty(logits, reference))[BATCH["mask"]].mean()
    assert found[0][1]["train/penalty"] == pytest.approx(kl, rel=1e-4)
    radius = optax.tree.get(found[0][0].opt_state, "radius")
    assert radius == pytest.approx(kl, rel=1e-4)


def test_lora_trains_its_factors_and_leaves_the_rest():
    model = Decoder(11, 4, 1, 2, 4)
    loaded = jax.jit(model.init)(jax.random.key(0), BATCH["tokens"])["params"]
    objective = NextToken(Network(model, NETWORK.tokenizer, loaded, 2, 4.0))
    assert objective.frozen is loaded
    trained, _ = objective.initial(jax.random.split(jax.random.key(1), 1))
    trained = jax.tree.map(lambda x: x[0], trained)
    tx = optax.adam(0.1)
    state = TrainState(trained, {}, tx.init(trained), None, jnp.zeros([], jnp.int32))
    step = jax.jit(lambda frozen, *rest: training_step(objective, tx, None, frozen)(*rest))
    losses = []
    for _ in range(10):
        state, metrics = step(loaded, state, BATCH, jax.random.key(0))
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < losses[0] - 1e-3
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 2 * 2 * (4 + 4)


def test_correlations_are_pearsons_over_methods():
    """Target 4, 2, 1 and genres 1, 2, 2.5 (falling line) and 8, 4, 2 (rising line)."""
    rows = []
    for stage, target, down, up in (("pretrain", 4, 1, 8), ("a", 2, 2, 4), ("b", 1, 2.5, 2)):
        for seed in range(2):
            final = {"final/target": target, "final/down": down + seed, "final/up": up}
            rows.append({"stage": stage, "seed": seed, **final})
    from experiments.runtime.task import Summary, Table

    empty = Summary({"pretrain": {}, "a": {}, "b": {}}, Table("", (), ()))
    found = language_report.with_genres_and_time(empty, rows, ["a", "b"]).values
    assert found["genres"] == {"correlated": ["up"], "anticorrelated": ["down"]}
    assert found["correlation"]["down"]["with_pretrain"]["seeds"] == pytest.approx([-1, -1])
    assert found["b"]["difference/final/anticorrelated"]["mean"] == pytest.approx(0.5)
    assert found["b"]["difference/final/correlated"]["mean"] == pytest.approx(-2)


def test_genres_without_files_are_pages_of_python(monkeypatch, capsys):
    monkeypatch.delenv("TRUSTJAX_DATA", raising=False)
    domains = Genres(source=["news"], target=["learned"]).load()
    assert "no folder brown in TRUSTJAX_DATA" in capsys.readouterr().out
    text = python_genres()
    assert [*domains.source, *domains.target, *domains.unseen] == [*text.label_names]
    assert len(domains.source) > 1 == len(domains.target)
    assert len(set(text.documents)) == len(text.documents)
    everything = Genres().load()
    assert (everything.source, everything.target) == ((), text.label_names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": ["downn"]}, "target must name genres of"),
        ({"source": ["down"], "target": ["down"]}, "target must share no genre .*'down'"),
        ({"target": ["down"], "unseen": ["down"]}, "target must share no genre"),
    ],
)
def test_wrong_genres(folder, changes, words):
    with pytest.raises(FieldError, match=words):
        Genres(path=str(folder), **changes).load()


def test_pretraining_needs_a_source(folder):
    task = task_of(folder, text=Genres(path=str(folder), target=["down"]))
    with pytest.raises(ValueError, match="pretrain_steps must be above 0 with genres in text"):
        task.validate()


def test_seconds_per_step_is_the_median():
    rows = [{"stage": "a", "step": n, "time/steps_per_second": rate}
            for n, rate in enumerate((10.0, 5.0, 4.0))]  # fmt: skip
    assert language_report.seconds_per_step(rows, "a") == pytest.approx(0.2)
    assert math.isnan(language_report.seconds_per_step(rows, "b"))
