"""A Llama of transformers, timed on request.

python torch_text.py CHECKPOINT BATCH TIME PROMPTS PROMPT_TIME NEW_TOKENS [--threads N]

It runs in the environment that `build.sh torch` makes. After a line of JSON with the versions and
some logits, it reads the name of a program per line, runs it once, and writes the seconds.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers


def tokens_of(rows: int, length: int, vocab: int) -> torch.Tensor:
    """The tokens of benchmarks/text.py."""
    numbers = np.arange(rows * length).reshape(rows, length) * 7919 % (vocab - 3) + 3
    return torch.from_numpy(numbers)


def main() -> None:
    """Loads the checkpoint, answers with what it computes, and runs programs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    for name in ("batch", "time", "prompts", "prompt_time", "new_tokens"):
        parser.add_argument(name, type=int)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    vocab = model.config.vocab_size
    tokens = tokens_of(options.batch, options.time, vocab)
    prompts = tokens_of(options.prompts, options.prompt_time, vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, foreach=True)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        logits: torch.Tensor = model(tokens).logits
        return logits

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    @torch.inference_mode()
    def generate() -> None:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=options.new_tokens,
            do_sample=False,
        )

    programs: dict[str, Callable[[], object]] = {
        "forward": forward, "train": train, "generate": generate,
    }  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    about = {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "logits": forward()[:, -1, :64].tolist(),
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        programs[line.strip()]()
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
