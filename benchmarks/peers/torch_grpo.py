"""TRL's GRPOTrainer, one iteration on request.

python torch_grpo.py CHECKPOINT PROMPTS ANSWERS NEW_TOKENS [--threads N]

It runs in the environment that `build.sh torch` makes. CHECKPOINT holds prompts.json beside the
model. After a line of JSON with the versions, it reads a line per iteration, runs one, and writes
the seconds: sampling, rewards, loss, gradient and the step of AdamW. All answers have as many
tokens, and the reward is a number that is at hand.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from trl import GRPOConfig, GRPOTrainer


class OnRequest(transformers.TrainerCallback):
    """Begins a step when a line is read, and writes the seconds that it took."""

    started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if not sys.stdin.readline():
            raise KeyboardInterrupt
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        print(time.perf_counter() - self.started, file=sys.__stdout__, flush=True)


def main() -> None:
    """Loads the checkpoint, says what it is, and runs iterations."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    for name in ("prompts", "answers", "new_tokens"):
        parser.add_argument(name, type=int)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    texts = json.loads((options.checkpoint / "prompts.json").read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=torch.float32
    )

    def reward(completions: list[str], **rest: Any) -> list[float]:
        return [float(index % 3) for index in range(len(completions))]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=options.prompts * options.answers,
            num_generations=options.answers,
            max_completion_length=options.new_tokens,
            generation_kwargs={"min_new_tokens": options.new_tokens},
            num_iterations=1,
            beta=0.0,
            loss_type="grpo",
            learning_rate=1e-6,
            max_steps=1_000_000,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[OnRequest()],
        )
        about = {
            "versions": {
                name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")
            },
            "threads": torch.get_num_threads(),
            "first_prompt_tokens": len(tokenizer(texts[0])["input_ids"]),
        }
        print(json.dumps(about), flush=True)
        # What the trainer prints would mix with the seconds.
        sys.stdout = sys.stderr
        try:
            trainer.train()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
