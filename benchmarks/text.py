"""Language models: heads without the array of logits, and what torch takes for the same model.

bash benchmarks/peers/build.sh torch FOLDER                 once
python -m benchmarks.text --out FILE [--peers FOLDER] [--repeats N] [--threads N]
    [--only head tiny small medium smollm2 ...]
XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m benchmarks.text ... --threads 2

`head` compares `token_log_probs`, `token_statistics` and `fused_cross_entropy` with the head
written out: value and gradient in one program, its time and the bytes of its temporary arrays.

The others build a Llama, save it as a Hugging Face folder, and give it to `transformers` in a
process of its own, which has to compute the same logits. Ours and the peer's forward pass,
training step (AdamW) and greedy generation take turns. Where JAX has several devices, such as one
for each core of a CPU, they share the rows of ours. A peer that is not there is skipped, and the
output says so. docs/benchmarks.md has the results.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.optimizers import Numbers, Program, environment, quartiles, take_turns
from benchmarks.peer import PeerProcess
from trustjax.losses import fused_cross_entropy, token_log_probs, token_statistics
from trustjax.models import Decoder, generate, save_transformer

TOKENS, FEATURES, VOCAB = 4096, 512, 50_257


class Workload(NamedTuple):
    """A model and the sizes of its programs.

    Attributes:
      model: The language model.
      batch: Rows of the forward pass and of a training step.
      time: Tokens of a row.
      prompts: Rows of the generation.
      prompt_time: Tokens of a prompt.
      new_tokens: Tokens of an answer; nothing ends it before.
    """

    model: Decoder
    batch: int = 8
    time: int = 128
    prompts: int = 64
    prompt_time: int = 16
    new_tokens: int = 128


WORKLOADS = {
    "tiny": Workload(
        Decoder(
            vocab_size=1024, width=128, depth=4, num_heads=4, num_kv_heads=2, mlp_width=384,
            max_length=512,
        )
    ),
    "small": Workload(
        Decoder(
            vocab_size=4096, width=192, depth=4, num_heads=6, num_kv_heads=3, mlp_width=512,
            max_length=512,
        )
    ),
    "medium": Workload(
        Decoder(
            vocab_size=8192, width=256, depth=4, num_heads=8, num_kv_heads=4, mlp_width=704,
            max_length=512,
        )
    ),
    "smollm2": Workload(
        Decoder(
            vocab_size=49152, width=576, depth=30, num_heads=9, num_kv_heads=3, mlp_width=1536,
            max_length=8192, rope_theta=100_000.0,
        ),
        batch=2, prompts=16, new_tokens=32,
    ),
}  # fmt: skip


def head_programs(tokens: int, features: int, vocab: int) -> dict[str, Program]:
    """Value and gradients of each way to compute log-probabilities, and of the mean."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(tokens, features)), jnp.float32)
    head = jnp.asarray(random.normal(size=(features, vocab)) / features**0.5, jnp.float32)
    targets = jnp.asarray(random.integers(0, vocab, tokens))
    slopes = jnp.asarray(random.normal(size=tokens), jnp.float32)

    def plain(hidden: jax.Array, head: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(hidden @ head, -1)
        return jnp.take_along_axis(log_probs, targets[:, None], -1)[:, 0]

    def statistics(hidden: jax.Array, head: jax.Array) -> jax.Array:
        found = token_statistics(hidden, head, targets, top=8)
        return jnp.sum(slopes * (found.log_probs + found.entropy))

    losses = {
        "plain log-probabilities": lambda h, w: jnp.sum(slopes * plain(h, w)),
        "token_log_probs": lambda h, w: jnp.sum(slopes * token_log_probs(h, w, targets)),
        "token_statistics": statistics,
        "plain cross-entropy": lambda h, w: -jnp.mean(plain(h, w)),
        "fused_cross_entropy": lambda h, w: fused_cross_entropy(h, w, targets),
    }
    return {
        name: Program(
            lambda c, *given, f=loss: (c, jax.value_and_grad(f, (0, 1))(*given)), (), hidden, head
        )
        for name, loss in losses.items()
    }


def measure_head(repeats: int, tokens: int = TOKENS, vocab: int = VOCAB) -> Numbers:
    """Seconds, bytes of temporaries, and both against the head written out."""
    programs = head_programs(tokens, FEATURES, vocab)
    seconds = take_turns(programs, repeats)
    rows: Numbers = {}
    for name, program in programs.items():
        mean = name.endswith("cross_entropy") or name.endswith("cross-entropy")
        plain = "plain cross-entropy" if mean else "plain log-probabilities"
        temporaries = program.memory["temporaries"]
        rows[name] = {
            "seconds": quartiles(seconds[name]),
            "ratio": quartiles(seconds[name] / seconds[plain]),
            "fastest_ratio": float(seconds[name].min() / seconds[plain].min()),
            "temporaries": temporaries,
            "times_less": programs[plain].memory["temporaries"] / temporaries,
        }
        ratio = rows[name]["ratio"]["median"]
        less = rows[name]["times_less"]
        print(f"head {name:24} {ratio:.2f} of the plain one's time, {less:.1f} times less memory")
    return {"sizes": {"tokens": tokens, "features": FEATURES, "vocab": vocab}, "rows": rows}


def model_programs(work: Workload, params: Any) -> dict[str, Callable[[], float]]:
    """Forward pass, training step and greedy generation of ours; the peer has the same tokens."""
    model = work.model
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    tokens, prompts = (
        jax.device_put(
            tokens_of(*shape, model.vocab_size), NamedSharding(mesh, PartitionSpec("data"))
        )
        for shape in ((work.batch, work.time), (work.prompts, work.prompt_time))
    )
    optimizer = optax.adamw(1e-4)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        hidden = model.apply({"params": params}, tokens[:, :-1], method="hidden")
        return fused_cross_entropy(hidden, model.head_matrix(params), tokens[:, 1:])

    def train(carry: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        value, slopes = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(slopes, state, params)
        return (optax.apply_updates(params, updates), state), value

    def answers(carry: tuple[()], params: Any, prompts: jax.Array) -> tuple[tuple[()], Any]:
        return carry, generate(
            model, params, prompts, jax.random.key(0),
            max_new_tokens=work.new_tokens, temperature=0.0,
        )  # fmt: skip

    def forward(carry: tuple[()], params: Any, tokens: jax.Array) -> tuple[tuple[()], Any]:
        return carry, model.apply({"params": params}, tokens)

    return {
        "forward": Program(forward, (), params, tokens),
        "train": Program(train, (params, optimizer.init(params)), tokens),
        "generate": Program(answers, (), params, prompts),
    }


def tokens_of(rows: int, time: int, vocab: int) -> np.ndarray:
    """The same tokens here and in the peer."""
    return (np.arange(rows * time).reshape(rows, time) * 7919 % (vocab - 3) + 3).astype(np.int32)


def measure_model(work: Workload, peers: Path, repeats: int, threads: int | None) -> Numbers:
    """Seconds and tokens per second of every program, and the ratio of the peer's time to ours."""
    params = jax.jit(work.model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    programs = model_programs(work, params)
    sizes = {
        "forward": work.batch * work.time,
        "train": work.batch * work.time,
        "generate": work.prompts * work.new_tokens,
    }
    python = peers.absolute() / "torch" / "bin" / "python"
    peer = None
    with tempfile.TemporaryDirectory() as folder:
        save_transformer(folder, work.model, params)
        if python.exists():
            numbers = [work.batch, work.time, work.prompts, work.prompt_time, work.new_tokens]
            options = [] if threads is None else ["--threads", threads]
            peer = PeerProcess(python, "torch_text.py", [folder, *numbers, *options])
    runs: dict[str, Callable[[], float]] = dict(programs)
    if peer is not None:
        check_agrees(work, params, peer.about)
        runs |= {f"transformers {name}": functools.partial(peer.run, name) for name in programs}
    seconds = take_turns(runs, repeats)
    if peer is not None:
        peer.close()
    rows: Numbers = {}
    for name in programs:
        rows[name] = {
            "seconds": quartiles(seconds[name]),
            "tokens_per_second": sizes[name] / float(np.median(seconds[name])),
        }
        text = f"{name:10}{rows[name]['tokens_per_second']:10.0f} tokens/s"
        if peer is not None:
            theirs = seconds[f"transformers {name}"]
            rows[name]["transformers_seconds"] = quartiles(theirs)
            rows[name]["times_faster"] = quartiles(theirs / seconds[name])
            text += f", {rows[name]['times_faster']['median']:.2f} times transformers"
        print(text, flush=True)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    missing = None if peer is not None else f"{python} is not there; benchmarks/peers/build.sh"
    about = {} if peer is None else peer.about
    return {
        "parameters": parameters,
        "sizes": {key: value for key, value in work._asdict().items() if key != "model"},
        "rows": rows,
        "devices": jax.device_count(),
        "peer": {key: about[key] for key in ("versions", "threads") if key in about},
        "missing": missing,
    }


def check_agrees(work: Workload, params: Any, there: Numbers) -> None:
    """Raises RuntimeError unless the peer has the same logits for the last tokens."""
    tokens = tokens_of(work.batch, work.time, work.model.vocab_size)
    logits: Any = jax.jit(work.model.apply)({"params": params}, tokens)
    if not np.allclose(logits[:, -1, :64], there["logits"], rtol=1e-3, atol=1e-3):
        raise RuntimeError("the peer has other logits for the same checkpoint and tokens")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints one line per program and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder of the peers")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=10, help="calls of every program, >= 1")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if left out")
    names = ("head", *WORKLOADS)
    parser.add_argument("--only", nargs="+", choices=names, default=list(names))
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {options.repeats}")
    numbers: Numbers = environment()
    for name in options.only:
        if name == "head":
            numbers[name] = measure_head(options.repeats)
        else:
            print(name)
            work = WORKLOADS[name]
            numbers[name] = measure_model(work, options.peers, options.repeats, options.threads)
    options.out.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
