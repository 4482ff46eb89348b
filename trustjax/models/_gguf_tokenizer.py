"""The tokenizer in the metadata of a GGUF file, as Hugging Face's tokenizer.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trustjax.models._store import wrong

# What splits a text before the merges, by llama.cpp's name of the rule.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_SPLITS: Mapping[str, Any] = {
    "gpt-2": {**_BYTE_LEVEL, "use_regex": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {**_BYTE_LEVEL, "use_regex": True},
        ],
    },
    "qwen2": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?"
                    r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                },
                "behavior": "Isolated",
                "invert": False,
            },
            {**_BYTE_LEVEL, "use_regex": False},
        ],
    },
}


def gguf_tokenizer(
    path: Path, metadata: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """tokenizer.json, tokenizer_config.json, and the special tokens for config.json."""

    def entry(name: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.{name}", default)
        if not isinstance(value, kind):
            raise wrong(path, f"tokenizer.{name}", kind.__name__, value)
        return value

    if (model := entry("ggml.model", str)) != "gpt2":
        raise wrong(path, "tokenizer.ggml.model", "'gpt2', a byte-level one", model)
    if (split := entry("ggml.pre", str, "gpt-2")) not in _SPLITS:
        raise wrong(path, "tokenizer.ggml.pre", ", ".join(map(repr, _SPLITS)), split)
    tokens, merges = entry("ggml.tokens", list), entry("ggml.merges", list)
    kinds = entry("ggml.token_type", list, [1] * len(tokens))
    added = [
        {"id": index, "content": token, "special": kind == 3, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (3, 4)  # control and user-defined
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if split == "qwen2" else None,
        "pre_tokenizer": _SPLITS[split],
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }  # fmt: skip
    if metadata.get("tokenizer.ggml.add_eos_token") is True:
        raise wrong(path, "tokenizer.ggml.add_eos_token", "false", True)
    ids = {
        short_name: metadata[f"tokenizer.ggml.{name}_token_id"]
        for short_name, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if metadata.get(f"tokenizer.ggml.{name}_token_id") in range(len(tokens))
    }
    config = {f"{name}_token": tokens[index] for name, index in ids.items()}
    if metadata.get("tokenizer.ggml.add_bos_token") is True:
        if "bos" not in ids:
            raise wrong(path, "tokenizer.ggml.bos_token_id", "a token", None)
        tokenizer["post_processor"] = _begins_with(config["bos_token"], ids["bos"])
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = entry("chat_template", str)
    return tokenizer, config, {f"{name}_token_id": index for name, index in ids.items()}


def _begins_with(token: str, number: int) -> dict[str, Any]:
    """The post-processor of tokenizer.json that puts a token in front of every text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    text, other = (
        {"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1))
    )
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, other],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
