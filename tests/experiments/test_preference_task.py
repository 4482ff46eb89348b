"""Preference training: the pairs, what losses read of them, and what is learned."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_adaptation import train

from experiments.optimizers import Optimizer
from experiments.preferences import ExampleLoss, PairLoss, Pairs
from experiments.runtime.config import CONF
from experiments.tasks.language_model import LanguageModel, answer_log_probs, rows_of
from experiments.tasks.preference import Preference
from experiments.tasks.preference_pairs import characters_per_word, pair_tokens, plain_words
from trustjax.data import PreferenceDataset, word_tokenizer
from trustjax.losses import dpo_loss, kto_loss
from trustjax.models.text_checkpoint import pretrained_transformer

FILES = sorted((CONF / "preference").glob("*.yaml"))
GOOD, BAD = "abcdef", "uvwxyz"


def letters() -> PreferenceDataset:
    """Of two answers of the same length, the one with more letters of GOOD is chosen."""
    random = np.random.default_rng(0)
    pairs = []
    while len(pairs) < 260:
        drawn = random.choice([*(GOOD + BAD)], (2, 5))
        good = np.isin(drawn, [*GOOD]).sum(1)
        if good[0] != good[1]:
            chosen, rejected = drawn[np.argsort(-good)]
            pairs.append((random.choice([*GOOD]), " ".join(chosen), " ".join(rejected)))
    return PreferenceDataset(*zip(*pairs, strict=True), "letters")


LOSSES = {
    "dpo": PairLoss(functools.partial(dpo_loss, beta=0.1)),
    "hinge": PairLoss(functools.partial(dpo_loss, beta=0.1, variant="hinge")),
}
KTO = {"kto": ExampleLoss(functools.partial(kto_loss, beta=0.1))}
SMALL = Preference(
    pairs=letters,
    model=LanguageModel(width=16, depth=1, num_heads=2, mlp_width=16, vocab_size=20),
    losses=LOSSES,
    optimizer=Optimizer(optax.adamw),
    seed=0,
    num_seeds=2,
    precision="float32",
    only=(),
    train_pairs=160,
    held_out_pairs=100,
    flipped=0.0,
    most_prompt=4,
    most_answer=8,
    pretrain_steps=0,
    pretrain_learning_rate=3e-3,
    steps=40,
    learning_rate=1e-2,
    batch_size=16,
    steps_per_chunk=20,
)


def test_plain_words_follow_their_rule() -> None:
    data = plain_words(margin=0.5)
    assert len(data.prompts) > 1000
    gaps = [
        characters_per_word(rejected) - characters_per_word(chosen)
        for chosen, rejected in zip(data.chosen, data.rejected, strict=True)
    ]
    assert min(gaps) > 0.5
    assert {len(prompt.split()) for prompt in data.prompts} == {4}
    counts = [len(answer.split()) for answer in data.chosen + data.rejected]
    assert (min(counts), max(counts)) == (5, 12)
    # Which answer belongs to the prompt says nothing: the chosen ones go on with it half the time.
    pages = [" ".join(w for w in page.split() if any(map(str.isalnum, w))) for page in _pages()]
    text = "\n".join(pages)
    belongs = [p + c in text for p, c in zip(data.prompts[:300], data.chosen[:300], strict=True)]
    assert 0.35 < np.mean(belongs) < 0.65
    with pytest.raises(ValueError, match="margin must leave at least one pair"):
        plain_words(margin=1e3)
    with pytest.raises(ValueError, match="longest_answer must be"):
        plain_words(longest_answer=4)


def _pages() -> Any:
    from trustjax.data import python_topics

    return python_topics().documents


def test_rows_of_a_pair_and_of_a_swapped_one() -> None:
    data = PreferenceDataset(("a b", "c"), ("d", "e f"), ("g", "h"), "two")
    tokenizer = word_tokenizer([*"abcdefgh"])  # a is 2, b is 3 and so on; 0 ends an answer
    tokens = pair_tokens(data, tokenizer, most_prompt=1, most_answer=2)
    assert tokens.num_examples == 4
    first = [[3, 5, 0], [3, 8, 0], [3, 6, 7], [3, 9, 0]]  # both answers, then those of the other
    np.testing.assert_array_equal(tokens.tokens[0], first)
    batch = tokens.batch(np.array([[0, 2], [1, 3]]))
    np.testing.assert_array_equal(batch["tokens"][0, 0], first)
    np.testing.assert_array_equal(batch["tokens"][0, 1], [first[i] for i in (1, 0, 3, 2)])
    np.testing.assert_array_equal(batch["pair"], [[0, 0], [1, 1]])
    np.testing.assert_array_equal(batch["answer"][0, 0], [[0, 1, 1]] * 4)


def check_learned(task: Preference, rows: Any) -> None:
    values, table = task.summarize(rows)
    for name in task.losses:
        found = {metric: entry["mean"] for metric, entry in values[name].items()}
        assert found["accuracy"] > 0.8
        assert found["accuracy/log_ratio"] == found["accuracy"]
        assert found["accuracy/reference"] < 0.7
        assert found["log_ratio/chosen"] > found["log_ratio/rejected"] + 1
    assert values[next(iter(task.losses))]["gain"]["mean"] == 0
    assert [row[0] for row in table.rows] == [*task.losses]


@pytest.fixture(scope="module")
def trained() -> Any:
    return train(SMALL)


@pytest.mark.slow
def test_it_learns_what_is_preferred(trained: Any, tmp_path: Path) -> None:
    """Fails with chosen and rejected exchanged, with the sign of the gradient, without a step."""
    rows, final = trained
    check_learned(SMALL, rows)
    # Not by its own measures: an answer of good letters has gained on one of bad letters.
    network = SMALL._network
    encoded = [network.tokenizer.encode(" ".join(text), special=False) for text in (GOOD, BAD)]
    texts = rows_of([encoded[0][:1]] * 2, encoded, network.tokenizer.pad_token)
    log_probs = jax.jit(
        lambda trained: answer_log_probs(network.model, network.params({}, trained), *texts)
    )
    after, before = (
        log_probs(jax.tree.map(lambda x: x[0], trained))
        for trained in (final["dpo"].trained, SMALL._initial())
    )
    assert (after - before)[0] > (after - before)[1] + 1
    SMALL.plot(rows, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"accuracy.png", "learning_curves.png"}


@pytest.mark.slow
def test_pretraining_comes_first_and_kto_reads_mismatched_answers(tmp_path: Path) -> None:
    task = dataclasses.replace(SMALL, losses=KTO, pretrain_steps=20, export_models=True)
    rows, final = train(task)
    losses = [row["loss"] for row in rows if row["stage"] == "pretrain"]
    assert max(losses) < np.log(14) - 0.03  # better than all tokens alike
    check_learned(task, rows)
    stage = task.stages()[1]
    assert stage.init(final).constants["reference"].shape == (2, 260, 4)
    jax.tree.map(
        np.testing.assert_array_equal, stage.init(final).trained, final["pretrain"].trained
    )
    stage.save(final["kto"], tmp_path)
    saved = pretrained_transformer(tmp_path / "models" / "kto" / "seed_1").load_pretrained()
    jax.tree.map(
        lambda file, state: np.testing.assert_array_equal(file, state[1]),
        saved,
        final["kto"].trained,
    )


def test_the_reference_is_the_model_before_the_first_step(trained: Any) -> None:
    """Its log-probabilities equal those of the policy then: all log-ratios are 0."""
    del trained
    dpo, hinge = SMALL.stages()
    state = dpo.init({})
    assert state.constants["reference"].shape == (2, 260, 2)
    found = dpo.program.measure({}, state.trained, dpo.held_out, state.constants, dpo.setting)
    for answer in ("chosen", "rejected"):
        np.testing.assert_allclose(found[f"log_ratio/{answer}"], 0, atol=1e-5)
    # Losses start from the same weights, see the same pairs in the same order, and share a program.
    np.testing.assert_array_equal(hinge.source[3]["pair"], dpo.source[3]["pair"])
    jax.tree.map(np.testing.assert_array_equal, hinge.init({}).trained, state.trained)
    assert hinge.program is dpo.program


def test_seeds_hold_out_pairs_of_their_own_and_swap_a_share() -> None:
    task = dataclasses.replace(SMALL, flipped=0.25, num_seeds=3)
    train_rows, held_out = task._rows
    pairs = train_rows % 260
    assert all(not {*a} & {*b} for a, b in zip(pairs, held_out, strict=True))
    np.testing.assert_array_equal((train_rows >= 260).sum(1), [40] * 3)
    assert {*held_out[0]} != {*held_out[1]}
    assert held_out.max() < 260  # held-out pairs keep their labels


@pytest.mark.table
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_loss_of_conf(path: Path) -> None:
    """Its value falls as the chosen answer gains what the rejected one loses."""
    loss = instantiate(OmegaConf.load(path), _convert_="all")
    numbers = np.array([-12.0, -20.5]), np.array([-13.0, -19.0])
    lengths = np.array([10, 16]), np.array([10, 16])
    mismatched = (np.full(4, -30.0),) * 2 if loss.mismatched else ()
    better, worse = (
        loss(Pairs(numbers[0] + gap, numbers[1] - gap, *numbers, *lengths, *mismatched))
        for gap in (8.0, -8.0)
    )
    assert np.isfinite([*better, *worse]).all()
    assert np.mean(better) < np.mean(worse)
    chosen, rejected = loss.rewards(Pairs(*numbers, *numbers[::-1], *lengths, *mismatched))
    assert chosen[0] > rejected[0]
    assert chosen[1] < rejected[1]


def test_every_loss_of_conf_is_in_the_experiment() -> None:
    lines = (CONF / "exp" / "dpo_pairs.yaml").read_text().splitlines()
    named = {line.rpartition(": ")[2] for line in lines if "/preference@" in line}
    assert named == {path.stem for path in FILES}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size must be >= 2"),
        ({"train_pairs": 8}, "train_pairs must be >= batch_size = 16"),
        ({"flipped": 1.5}, "flipped must be"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"pretrain_steps": -1}, "pretrain_steps must be >= 0"),
        ({"only": ("ppo",)}, r"only must name losses of \['dpo', 'hinge'\]"),
    ],
)
def test_wrong_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes).validate()


def test_too_few_pairs() -> None:
    with pytest.raises(ValueError, match="train_pairs must be <= 160, as letters has 260 pairs"):
        dataclasses.replace(SMALL, train_pairs=161).stages()


def test_arguments_of_a_loss() -> None:
    with pytest.raises(ValueError, match="arguments must name some of"):
        PairLoss(dpo_loss, ("policy_kl",))
