"""Writes tests/golden/generation.json: greedy answers and filtered logits of transformers.

Needs torch and transformers (made with torch 2.13.0, transformers 5.24.0):
    python tests/golden/make_generation.py
It reads the checkpoints that make_text.py has written.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

FOLDER = Path(__file__).parent
PROMPTS = [[3, 17, 5, 11, 29], [7, 14, 13]]
FILTERS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.5, "top_k": 100, "top_p": 0.95},
]


def greedy(name: str) -> list[list[int]]:
    """Twelve more tokens of each prompt, by itself; nothing ends an answer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "text" / name)
    model = model.to(torch.float32).eval()
    model.generation_config.eos_token_id = None
    return [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=True
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]  # fmt: skip


def filtered(logits: torch.Tensor, options: dict[str, float]) -> list[list[float]]:
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for name, warper in warpers.items():
        if name in options:
            logits = warper(options[name])(None, logits)
    return torch.softmax(logits, -1).tolist()


if __name__ == "__main__":
    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 30)
    names = ("gpt2", "llama", "smollm2", "qwen2", "qwen3")
    content = {
        "origin": f"transformers {version('transformers')}, torch {version('torch')}",
        "prompts": PROMPTS,
        "greedy": {name: greedy(name) for name in names},
        "logits": logits.tolist(),
        "filters": [{"options": each, "probs": filtered(logits, each)} for each in FILTERS],
    }
    path = FOLDER / "generation.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
