"""An iteration of GRPO on knights and knaves, by stage, and the same one in TRL's trainer.

bash benchmarks/peers/build.sh torch FOLDER                 once
python -m benchmarks.knights --out FILE [--peers FOLDER] [--repeats N] [--threads N]

A small Llama draws groups of answers to puzzles and takes one step of Adam on GRPO's loss. No token
ends an answer, so that every iteration draws and learns from as many tokens. Stages of ours:

    prefill             the prompts go through the model, and first tokens are drawn
    decode              the other tokens; the time of the whole sampling, less that of the prefill
    reward              answers are scored, by the rules in JAX
    log-probabilities   one forward pass over prompts and answers
    loss and step       forward pass, gradient, Adam

The whole iteration is one program, which also measures how far the policy went, with one more
forward pass. The same model, as a Hugging Face folder, learns in TRL's GRPOTrainer in a process of
its own, with the same numbers of prompts, answers and tokens and a reward that takes no time.
Iterations and stages take turns. A peer that is not there is skipped, and the output says so.
docs/benchmarks.md has the results.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from benchmarks.optimizers import Numbers, Program, environment, quartiles, take_turns
from benchmarks.peer import PeerProcess
from trustjax.agents.language import Config, answer_statistics
from trustjax.envs.knights import sample_puzzles
from trustjax.envs.knights_text import NAMES
from trustjax.envs.knights_tokens import Knights
from trustjax.losses import group_relative, grpo_loss
from trustjax.models import Decoder, generate, save_transformer

PEER = "trl"


def workload(
    *, width: int, depth: int, num_prompts: int, num_samples: int, new_tokens: int
) -> tuple[Config, Knights]:
    """The config of an iteration, and the puzzles."""
    env = Knights(names=NAMES[:3])
    prompts, _ = env.prompts([sample_puzzles(3, max(64, num_prompts))])
    model = Decoder(
        vocab_size=env.tokenizer.vocab_size, width=width, depth=depth, num_heads=2,
        mlp_width=2 * width, max_length=512,
    )  # fmt: skip
    config = Config(
        model=model, prompts=prompts, reward=env.reward, num_prompts=num_prompts,
        num_samples=num_samples, max_new_tokens=new_tokens, stop_tokens=(),
        pad_token=env.tokenizer.pad_token, num_epochs=1, learning_rate=1e-6,
    )  # fmt: skip
    return config, env


def programs_of(config: Config, params: Any) -> dict[str, Program]:
    """The whole iteration and its stages, each a program of its own."""
    agent, model = config.agent(), config.model
    prompts = config.prompts.take(jnp.arange(config.num_prompts))
    optimizer = config.optimizer(config.learning_rate)

    def sampled(new_tokens: int, carry: tuple[()], params: Any) -> Any:
        return carry, generate(
            model, params, prompts.tokens, jax.random.key(0), prompt_mask=prompts.mask,
            num_samples=config.num_samples, max_new_tokens=new_tokens,
        )  # fmt: skip

    _, answers = jax.jit(functools.partial(sampled, config.max_new_tokens, ()))(params)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, config.num_samples, 0), prompts)

    def statistics(params: Any) -> Any:
        return answer_statistics(
            model, params, repeated.tokens, repeated.mask, answers.tokens, answers.mask
        )

    def rewarded(carry: tuple[()], answers: Any) -> Any:
        return carry, config.reward(repeated.facts, answers.tokens, answers.mask).reward

    _, rewards = jax.jit(rewarded)((), answers)
    advantages = group_relative(rewards, group_size=config.num_samples)

    def step(carry: Any) -> Any:
        params, state = carry

        def loss(params: Any) -> jax.Array:
            log_probs = statistics(params).log_probs
            old = jax.lax.stop_gradient(log_probs)
            return grpo_loss(log_probs, old, advantages, answers.mask)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    state = agent.init(jax.random.key(0))._replace(params=params)
    return {
        "iteration": Program(agent.update, state),
        "prefill": Program(functools.partial(sampled, 1), (), params),
        "sampling": Program(functools.partial(sampled, config.max_new_tokens), (), params),
        "reward": Program(rewarded, (), answers),
        "log-probabilities": Program(lambda c, p: (c, statistics(p).log_probs), (), params),
        "loss and step": Program(step, (params, optimizer.init(params))),
    }


def stages(seconds: dict[str, np.ndarray], config: Config) -> Numbers:
    """Seconds, tokens per second and the share of an iteration, by stage."""
    tokens = config.num_prompts * config.num_samples * config.max_new_tokens
    prompt_tokens = int(np.sum(config.prompts.mask[: config.num_prompts]))
    found = {**seconds, "decode": seconds["sampling"] - seconds["prefill"]}
    counts = dict.fromkeys(found, tokens) | {"prefill": prompt_tokens}
    return {
        name: {
            "seconds": quartiles(each),
            "tokens_per_second": counts[name] / float(np.median(each)),
            "share": float(np.median(each / seconds["iteration"])),
        }
        for name, each in found.items()
    }


def write_model(folder: str, config: Config, env: Knights, params: Any) -> None:
    """The model and its tokenizer of words, as a Hugging Face folder."""
    save_transformer(folder, config.model, params)
    size = env.tokenizer.vocab_size
    words = [env.tokenizer.to_text([token]) for token in range(size)]
    own = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: token for token, word in enumerate(words)}, unk_token=words[1]
        )
    )
    pattern = tokenizers.Regex(r"</?\w+>|\w+|[^\w\s]")
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "removed", invert=True)
    own.save(str(Path(folder) / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": words[0]}
    names |= {"pad_token": words[0], "unk_token": words[1]}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


def start_peer(
    python: Path, config: Config, env: Knights, params: Any, threads: int | None
) -> PeerProcess:
    """TRL's trainer with the same model, prompts and numbers."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, config, env, params)
        tokens, masks = np.asarray(config.prompts.tokens), np.asarray(config.prompts.mask)
        texts = [env.tokenizer.decode(row[mask]) for row, mask in zip(tokens, masks, strict=True)]
        (Path(folder) / "prompts.json").write_text(json.dumps(texts), encoding="utf-8")
        numbers = [config.num_prompts, config.num_samples, config.max_new_tokens]
        options = [] if threads is None else ["--threads", threads]
        peer = PeerProcess(python, "torch_grpo.py", [folder, *numbers, *options])
    expected = int(masks[0].sum())
    if peer.about["first_prompt_tokens"] != expected:
        got = peer.about["first_prompt_tokens"]
        raise RuntimeError(f"the peer's first prompt has {got} tokens, not {expected}")
    return peer


def measure(
    config: Config, env: Knights, peers: Path, repeats: int, threads: int | None
) -> Numbers:
    """Times of all stages, and the ratio of the peer's iteration to ours within a turn."""
    some = config.prompts.tokens[:1]
    params = jax.jit(config.model.init)(jax.random.key(0), some)["params"]
    programs: dict[str, Callable[[], float]] = dict(programs_of(config, params))
    python = peers.absolute() / "torch" / "bin" / "python"
    peer = start_peer(python, config, env, params, threads) if python.exists() else None
    if peer is not None:
        programs[PEER] = functools.partial(peer.run, "iteration")
    seconds = take_turns(programs, repeats)
    numbers: Numbers = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "sizes": {
            "prompts": config.num_prompts, "answers": config.num_samples,
            "new_tokens": config.max_new_tokens,
            "prompt_tokens": int(config.prompts.tokens.shape[1]),
            "vocabulary": config.model.vocab_size, "width": config.model.width,
            "depth": config.model.depth,
        },
        "missing": None if peer else f"{python} is not there; benchmarks/peers/build.sh",
    }  # fmt: skip
    theirs = seconds.pop(PEER, None)
    numbers["stages"] = stages(seconds, config)
    numbers["updates_per_second"] = 1 / float(np.median(seconds["iteration"]))
    if peer is not None and theirs is not None:
        numbers["peer"] = {key: peer.about[key] for key in ("versions", "threads")}
        numbers["peer_seconds"] = quartiles(theirs)
        numbers["times_faster"] = quartiles(theirs / seconds["iteration"])
        peer.close()
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints one line per stage and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.knights")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder of the peers")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=10, help="turns, >= 1")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if left out")
    sizes = {"width": 64, "depth": 3, "num-prompts": 8, "num-samples": 8, "new-tokens": 112}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {options.repeats}")
    given = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in sizes}
    config, env = workload(**given)
    numbers = environment() | measure(config, env, options.peers, options.repeats, options.threads)
    for name, row in numbers["stages"].items():
        rate, share = row["tokens_per_second"], row["share"]
        print(f"{name:18}{rate:10.0f} tokens/s, {share:5.2f} of an iteration")
    if "times_faster" in numbers:
        print(f"{numbers['times_faster']['median']:.2f} times as fast as TRL")
    options.out.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
