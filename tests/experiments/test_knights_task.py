"""The experiment of knights and knaves, on models that are too small to learn much."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killing import assert_survives_kills

from experiments.tasks.knights import KnightsAndKnaves
from experiments.trackers import read_rows
from trustjax.agents.language import TRPA, Config
from trustjax.models import Decoder

TASK = KnightsAndKnaves(
    methods={
        "trpa": functools.partial(Config, objective=TRPA(), num_prompts=2, num_samples=2),
        "grpo": functools.partial(Config, num_prompts=2, num_samples=2),
    },
    model=functools.partial(Decoder, width=8, depth=1, num_heads=2, mlp_width=8),
    num_people=[2, 3], train_puzzles=30, test_puzzles=10, num_names=4, shuffle_names=True,
    guesses=0.5, fine_tuning_steps=2, fine_tuning_batch=2, fine_tuning_rate=1e-3,
    judge_errors=1.0, judge_kind="hacked", num_updates=2, updates_per_chunk=1, max_new_tokens=6,
    evaluation_samples=2, remembered=3, unseen_people=[4], seed=0, num_seeds=2,
    precision="float32", only=[],
)  # fmt: skip
SMALL = (
    "+exp=trpa_knights", "task.only=[trpa,dapo]", "num_seeds=2", "task.num_people=[2]",
    "task.train_puzzles=20", "task.test_puzzles=4", "task.fine_tuning_steps=2",
    "task.fine_tuning_batch=2", "task.num_updates=2", "task.updates_per_chunk=1",
    "task.max_new_tokens=6", "task.evaluation_samples=2", "task.model.width=8",
    "task.remembered=2", "task.unseen_people=[3]",
    "task.model.depth=1", "task.model.mlp_width=8", "checkpoint.every=1",
)  # fmt: skip


def test_no_test_puzzle_is_trained_on() -> None:
    puzzles = TASK.puzzles
    both = [
        np.asarray(part.facts.statements).reshape(-1, 20) for part in (puzzles.train, puzzles.test)
    ]
    assert [len(part) for part in both] == [60, 20]
    assert len(np.unique(np.concatenate(both), axis=0)) == 80
    assert sorted(np.unique(puzzles.test.facts.num_people)) == [2, 3]
    lengths = np.asarray(jnp.sum(puzzles.answer_mask, -1))
    assert lengths[0].max() == puzzles.answers.shape[2]
    assert np.all(lengths[1] <= lengths[0])


def test_puzzles_are_asked_once_more_as_they_were_and_changed() -> None:
    train, others = TASK.puzzles.train.facts, TASK.puzzles.others
    assert [*others] == ["4_unseen", "train", "statement", "leaf"]
    assert np.all(others["4_unseen"].facts.num_people == 4)
    known = {each.tobytes() for each in np.asarray(train.statements)}
    for name in ("train", "statement", "leaf"):
        facts = others[name].facts
        assert facts.num_people.tolist() == [2] * 3 + [3] * 3
        assert [each.tobytes() in known for each in np.asarray(facts.statements)] == 6 * [
            name == "train"
        ]
        same = np.all(facts.solution == others["train"].facts.solution, -1)
        assert np.all(same == (name == "train"))


def test_all_methods_begin_from_the_same_model() -> None:
    tuning, *methods = TASK.stages()
    assert [stage.name for stage in methods] == ["trpa", "grpo"]
    tuned = tuning.init({})
    for stage in methods:
        state = stage.init({"warm_start": tuned})
        for own, given in zip(
            jnp.ravel(state.params["token_embedding"]["embedding"][1]),
            jnp.ravel(tuned.params["token_embedding"]["embedding"]),
            strict=True,
        ):
            assert own == given


def test_methods_learn_from_the_judge_and_are_examined_by_the_rules() -> None:
    _, trpa, _ = TASK.stages()
    facts = TASK.puzzles.train.facts
    # Half of them worked out, and half guessed.
    half = np.arange(len(facts.num_people)) % 2
    rows = half, np.arange(len(half))
    answers = TASK.puzzles.answers[rows], TASK.puzzles.answer_mask[rows]
    configs = trpa.config, trpa.examination.config
    judged, true = (jax.jit(config.reward)(facts, *answers) for config in configs)
    wrong = np.asarray(true.level) != 1
    assert 0 < wrong.mean() < 0.5
    np.testing.assert_array_equal(judged.thinking[wrong], 1)
    np.testing.assert_array_equal(true.thinking[wrong], 0)  # a guess has no steps
    np.testing.assert_array_equal(judged.reward, true.reward)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_people": [9]}, r"num_people must be numbers from 2 to 8, got \[9\]"),
        ({"num_names": 2}, "num_names must be from 4 to 26, got 2"),
        ({"only": ["ppo"]}, r"only must name methods of \['grpo', 'trpa'\], got 'ppo'"),
        ({"unseen_people": [3]}, r"unseen_people must be numbers from 2 to 8 without \[2, 3\]"),
        ({"unseen_people": [5]}, "num_names must be from 5 to 26, got 4"),
        ({"remembered": -1}, "remembered must be >= 0, got -1"),
        ({"num_updates": 0}, "num_updates must be >= 1, got 0"),
        ({"guesses": 1.5}, "guesses must be <= 1, got 1.5"),
        ({"judge_errors": -0.1}, "judge_errors must be >= 0, got -0.1"),
        ({"judge_kind": "bribed"}, "judge_kind must be one of 'inverted', 'hacked'"),
        ({"precision": "bfloat16"}, "precision must be one of 'float32'"),
        (
            {"methods": {"grpo": functools.partial(Config, num_prompts=3, num_minibatches=2)}},
            "methods.grpo.num_minibatches must divide the 3 prompts, got 2",
        ),
    ],
)
def test_errors_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TASK, **changes).validate()


@pytest.mark.slow
def test_a_run_and_its_continuation(tmp_path: Path) -> None:
    """A run that is killed goes on to the same numbers as one that is not, which are whole."""
    assert_survives_kills(SMALL, tmp_path, num_kills=2)
    found = json.loads((tmp_path / "whole" / "summary.json").read_text())["result"]
    assert set(found) == {"warm_start", "trpa", "dapo"}
    assert len(found["trpa"]["final/accuracy"]["seeds"]) == 2
    names = ("3_unseen", "train", "statement", "leaf")
    assert {f"final/accuracy_{name}" for name in names} <= {*found["trpa"]}
    assert (tmp_path / "whole" / "answers" / "trpa.txt").read_text().count("level") >= 4
    assert (tmp_path / "whole" / "plots" / "trust_region.png").is_file()
    rows = read_rows(tmp_path / "whole" / "metrics.csv")
    assert {"trust/used", "level/1", "rollout/difference", "pass@8"} <= {*rows[-3]}
