"""Writes tests/golden/text: tiny random checkpoints of transformers' text models and their logits.

Needs torch and transformers (made with torch 2.13.0, transformers 5.24.0):
    python tests/golden/make_text.py
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "text"
TOKENS = np.array([[3, 17, 5, 11, 29, 8, 2, 31, 4], [7, 14, 13, 22, 30, 6, 1, 1, 1]])
MASK = np.array([[1] * 9, [1] * 6 + [0] * 3])
TYPES = np.array([[0] * 4 + [1] * 5, [0] * 2 + [1] * 7])
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
XLMR = BERT | {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
# The class, the fields of its config, the dtype, the size of shards.
CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2, "float32", None),
    "llama": (
        "LlamaForCausalLM",
        LLAMA | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
        "float16",
        None,
    ),
    "smollm2": (
        "LlamaForCausalLM",
        LLAMA | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 100000.0}},
        "bfloat16",
        None,
    ),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"rms_norm_eps": 1e-5}, "float32", "12KB"),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}, "float32", None),
    "bert": ("BertModel", BERT, "float32", None),
    "bert_masked_lm": ("BertForMaskedLM", BERT, "float32", None),
    "bert_sequence": ("BertForSequenceClassification", BERT | LABELS, "float32", None),
    "xlm_roberta_masked_lm": ("XLMRobertaForMaskedLM", XLMR, "float32", None),
    "xlm_roberta_tokens": ("XLMRobertaForTokenClassification", XLMR | LABELS, "float32", None),
    "xlm_roberta_sequence": (
        "XLMRobertaForSequenceClassification", XLMR | LABELS, "float32", None,
    ),
}  # fmt: skip


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """No parameter at a special value such as 0 or 1, or its place would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = around + scale * noise
    return model.eval()


def outputs(folder: Path, kind: type, family: str) -> dict[str, list]:
    """What the saved model computes in float32; of the second row the padding is cut off."""
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = family.startswith(("bert", "xlm"))
    inputs = {"input_ids": torch.tensor(TOKENS), "attention_mask": torch.tensor(MASK)}
    if family.startswith("bert"):
        inputs["token_type_ids"] = torch.tensor(TYPES)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    found = {"hidden": out.hidden_states[-1], "logits": getattr(out, "logits", None)}
    found["pooled"] = getattr(out, "pooler_output", None) if encoder else None
    lengths = MASK.sum(1).tolist()
    return {
        name: [rounded(x[i, :n] if x.ndim > 2 else x[i]) for i, n in enumerate(lengths)]
        for name, x in found.items()
        if x is not None
    }


def rounded(tensor: torch.Tensor) -> list:
    return tensor.double().numpy().round(6).tolist()


def main() -> None:
    golden = {"origin": f"torch {torch.__version__}, transformers {transformers.__version__}"}
    golden |= {"tokens": TOKENS.tolist(), "mask": MASK.tolist(), "types": TYPES.tolist()}
    for seed, (name, (kind, config, dtype, shards)) in enumerate(CASES.items()):
        kind = getattr(transformers, kind)
        model = randomize(kind(kind.config_class(**config)), seed).to(getattr(torch, dtype))
        sizes = {} if shards is None else {"max_shard_size": shards}
        model.save_pretrained(FOLDER / name, **sizes)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        golden[name] = outputs(FOLDER / name, kind, name)
    (FOLDER / "outputs.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
