"""Writes tests/golden/gguf: what the package gguf makes of numbers, and a tiny model of Llama's.

Needs gguf, safetensors and ml_dtypes (made with gguf 0.19.0), after make_text.py:
    python tests/golden/make_gguf.py
"""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from ml_dtypes import bfloat16  # noqa: F401  # safetensors looks it up
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent / "gguf"
SOURCE = Path(__file__).parent / "text" / "smollm2"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py does (LlamaModel.permute)."""
    shape = (heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def model(path: Path) -> None:
    config = json.loads((SOURCE / "config.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(ord("a") + index) for index in range(26)] + list("0123456789")
    writer.add_token_list(["<|end|>", "<|start|>", *letters, "Ġ", "th"])
    writer.add_token_types([3, 3] + [1] * 38)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}")
    for name, tensor in load_file(SOURCE / "model.safetensors").items():
        tensor = tensor.astype(np.float32)
        if "q_proj" in name:
            tensor = permute(tensor, config["num_attention_heads"])
        elif "k_proj" in name:
            tensor = permute(tensor, config["num_key_value_heads"])
        theirs = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
        if name.startswith("model.layers."):
            _, _, index, rest = name.removesuffix(".weight").split(".", 3)
            theirs[name] = f"blk.{index}.{NAMES[rest]}"
        writer.add_tensor(f"{theirs[name]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(path: Path) -> dict[str, list]:
    """Numbers in blocks of each type, and what they come back as."""
    numbers = (np.sin(np.arange(128.0) ** 1.5) * 3 + 0.5).astype(np.float32).reshape(2, 64)
    writer = GGUFWriter(path, "numbers")
    expected = {}
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"):
        kind = GGMLQuantizationType[name]
        raw = quants.quantize(numbers, kind)
        expected[name] = quants.dequantize(raw, kind).reshape(2, 64).tolist()
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    model(FOLDER / "llama.gguf")
    golden = blocks(FOLDER / "blocks.gguf")
    (FOLDER / "blocks.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
