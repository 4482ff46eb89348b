"""A checkpoint that is written here learns from rewards, with its own tokenizer and template."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.runtime.config import CONF
from experiments.tasks.knights_training import WARM_START
from experiments.tasks.language_model import LanguageModel
from experiments.tasks.reasoning import Reasoning
from experiments.tasks.reasoning_questions import (
    Questions,
    generated_knights,
    knights_folder,
    numbers_folder,
)
from trustjax.agents.language import Config, PolicyGradient
from trustjax.envs.knights_text import Score
from trustjax.models import Decoder, pretrained_transformer, save_transformer
from trustjax.parallel import make_mesh

WORDS = "user assistant <think> </think> <answer> </answer> 1 2 3 + = is ? What"
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def write_checkpoint(folder: Path) -> Path:
    """A random Qwen2 of 7,000 parameters, whose vocabulary is larger than its tokenizer's."""
    own = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: number for number, word in enumerate(["<unk>", *WORDS.split()])},
            unk_token="<unk>",
        )
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    own.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    model = Decoder(
        vocab_size=own.get_vocab_size() + 3, width=32, depth=1, num_heads=4, num_kv_heads=2,
        mlp_width=32, qkv_bias=True, max_length=64,
    )  # fmt: skip
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), int))["params"]
    params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    save_transformer(folder, model, params)
    own.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen2"))


def sums(folder: Path) -> Path:
    """Questions in the layout of GSM8K."""
    rows = [
        {"question": f"What is {a} + {b} ?", "answer": f"{a} + {b} = {a + b} #### {a + b}"}
        for a, b in ((1, 1), (1, 2), (2, 1))
    ]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def task(checkpoint: Path, questions: Any, **changes: Any) -> Reasoning:
    own: dict[str, Any] = {
        "methods": {
            "grpo": functools.partial(Config, num_prompts=2, num_samples=4, learning_rate=0.01)
        },
        "model": LanguageModel(
            width=1, depth=1, num_heads=1, mlp_width=1, pretrained=str(checkpoint), lora_rank=2
        ),
        "questions": questions, "mesh": make_mesh(1), "shard_params": False,
        "answer_start": "<think>", "most_prompt": 40, "max_new_tokens": 4, "num_updates": 2,
        "updates_per_chunk": 2, "test_questions": 2, "evaluation_samples": 2, "memory_gib": None,
        "export_models": True, "seed": 0, "num_seeds": 1, "precision": "float32", "only": [],
    }  # fmt: skip
    return Reasoning(**{**own, **changes})


def number_questions(folder: Path, **options: Any) -> Any:
    options = {"instruction": "", "split": "train", "test_split": "test", "tags": False, **options}
    return functools.partial(numbers_folder, path=str(sums(folder)), **options)


@pytest.mark.slow
def test_a_checkpoint_trains_from_end_to_end(checkpoint: Path, tmp_path: Path) -> None:
    """Two updates of LoRA; the written model is another Qwen2 with its tokenizer."""
    own = task(checkpoint, number_questions(tmp_path))
    own.validate()
    stages, final, rows = own.stages(), {}, []
    assert [stage.name for stage in stages] == [WARM_START, "grpo"]
    for stage in stages:
        state, new = stage.advance(stage.init(final), None, 0, stage.num_steps)
        rows += [*new, *stage.finish(state)]
        final[stage.name] = state
    assert rows[0]["trained_parameters"] == 2 * 32 * 2 + 2 * 32 + 2 * 16
    learning = [row for row in rows if "reward/mean" in row]
    assert [row["step"] for row in learning] == [1, 2]
    for row in learning:
        assert row["gradient_steps"] == 2
        assert row["reward/mean"] == -0.5 * row["level/2"] - row["level/3"] + 3 * row["level/1"]
        assert row["time/reward"] > 0
        assert row["rollout/largest"] < 1e-4
    assert sum("final/accuracy" in row for row in rows) == 2
    for stage in stages:
        stage.save(final[stage.name], tmp_path)
        text = (tmp_path / "answers" / f"{stage.name}.txt").read_text()
        assert "user What is" in text
        assert text.count("level") == 2
    folder = tmp_path / "models" / "grpo" / "seed_0"
    model = pretrained_transformer(folder)
    old, new = (pretrained_transformer(each).load_pretrained() for each in (checkpoint, folder))
    assert model.vocab_size == 20
    assert (folder / "tokenizer.json").is_file()
    kernel = "block_0", "attention", "query", "kernel"
    before, after = (functools.reduce(lambda x, k: x[k], kernel, each) for each in (old, new))
    assert 0 < np.max(np.abs(before - after)) < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ["ppo"]}, r"only must name methods of \['grpo'\], got 'ppo'"),
        ({"precision": "float64"}, "precision must be one of 'float32', 'bfloat16'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"memory_gib": 0.0}, "memory_gib must be > 0, got 0.0"),
    ],
)
def test_errors_name_the_field(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(checkpoint, None, **changes).validate()


def test_a_model_must_be_a_checkpoint() -> None:
    new = LanguageModel(width=4, depth=1, num_heads=1, mlp_width=4)
    with pytest.raises(ValueError, match=r"set model\.pretrained=FOLDER"):
        task(Path(), None, model=new).validate()


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ({"lora_rank": None}, "model.lora_rank=8, or mesh=data task.shard_params=true"),
        ({}, r"model.remat=true or task.methods.grpo.num_minibatches=2 helps"),
    ],
)
def test_too_little_memory_names_the_overrides(
    checkpoint: Path, tmp_path: Path, model: dict[str, Any], advice: str
) -> None:
    own = task(checkpoint, number_questions(tmp_path), memory_gib=1e-9)
    own.model = dataclasses.replace(own.model, **model)
    if model:  # weights outweigh the activations of one short answer
        alone = PolicyGradient(advantage=lambda rewards: rewards)  # a group of one is enough
        method = functools.partial(Config, num_prompts=1, num_samples=1, objective=alone)
        own.methods = {"grpo": method}
        own.max_new_tokens = own.test_questions = own.evaluation_samples = 1
    with pytest.raises(ValueError, match=advice) as error:
        own.stages()
    assert str(error.value).startswith("memory_gib must be >= ")
    assert "_network" not in vars(own)  # no weights were read


def test_long_prompts_are_left_out(checkpoint: Path, tmp_path: Path) -> None:
    own = task(checkpoint, number_questions(tmp_path), most_prompt=3)
    with pytest.raises(ValueError, match=r"^most_prompt must be >= 12, the shortest prompt of"):
        own.stages()


def test_methods_are_checked_by_name(checkpoint: Path, tmp_path: Path) -> None:
    methods = {"grpo": functools.partial(Config, num_prompts=3, num_minibatches=2)}
    own = task(checkpoint, number_questions(tmp_path), methods=methods)
    with pytest.raises(
        ValueError, match=r"methods\.grpo\.num_minibatches must divide the 3 prompts"
    ):
        own.stages()


def test_generated_puzzles_and_those_of_a_folder(tmp_path: Path) -> None:
    found = generated_knights(instruction="Think.", num_people=[2, 3], train=5, test=4)
    assert (len(found.train), len(found.test)) == (10, 8)
    assert not {each.prompt for each in found.train} & {each.prompt for each in found.test}
    names = re.findall(r"You meet (\w+) and (\w+)\.", found.train[0].prompt)[0]
    said = [
        f"<think></think><answer>{names[0]} is a {a}, {names[1]} is a {b}</answer>"
        for a in ("knight", "knave")
        for b in ("knight", "knave")
    ]
    assert sorted(found.train[0].score(text).level for text in said) == [1, 2, 2, 2]
    row = {"quiz": "Who?", "names": ["A", "B"], "solution": [True, False]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    read = knights_folder(instruction="", path=str(tmp_path), split="train", test_split="train")
    right = "<think></think><answer>A is a knight, B is a knave</answer>"
    assert read.test[0].prompt == "Who?"
    assert read.train[0].score(right) == Score(1, 3.0)


def test_numbers_need_a_number(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"question": "x", "answer": "none"}\n')
    with pytest.raises(ValueError, match="row 0: no number in the answer 'none'"):
        numbers_folder(
            instruction="", path=str(tmp_path), split="train", test_split="test", tags=True
        )


@pytest.mark.parametrize("name", ["knights_folder", "numbers_folder"])
def test_files_of_questions(name: str, tmp_path: Path) -> None:
    row = {
        "question": "1 + 1?", "answer": "2", "names": ["A", "B"], "solution": [True, False],
    }  # fmt: skip
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    node = OmegaConf.load(CONF / "questions" / f"{name}.yaml")
    own = {"path": str(tmp_path), "split": "train", "test_split": "test"}
    node = OmegaConf.merge(node, own)
    found: Questions = instantiate(node)()
    assert found.train[0].prompt.endswith("</answer>\n\n1 + 1?")
