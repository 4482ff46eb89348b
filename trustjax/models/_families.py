"""Families of Hugging Face's text models: their fields in config.json and the names of tensors.

One table a family says what is where; `trustjax.models.text_checkpoint` reads and writes by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trustjax.models.encoder import Encoder
from trustjax.models.transformer import Decoder


@dataclass(frozen=True)
class Family:
    """What transformers calls the parts of a model.

    Attributes:
      model_type: The family's name in config.json.
      model: Our module.
      keys: The key in config.json of each field of the module.
      defaults: Values of keys that config.json leaves out, as in transformers. None stands for a
        value that follows from others.
      required: Keys of which one value is implemented; without the key they have it.
      fixed: Fields that are the same in all models of the family.
      architectures: The class in transformers, by the head.
      prefix: What precedes the names of tensors of a model that has a head.
      names: Names of tensors, without "weight", by our module or parameter. Modules of a block are
        written with a slash. A name that begins with a colon takes no prefix. Modules with the
        same name are columns of one tensor, in the order here.
      heads: Names that hold for a head alone, before those in `names`.
      block: What precedes the names of tensors of a block.
      transposed: Whether matrices are stored as [out, in].
      ignored: A pattern of tensors that are not parameters, or that nothing here uses.
    """

    model_type: str
    model: type[Decoder] | type[Encoder]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    required: Mapping[str, Any]
    fixed: Mapping[str, Any]
    architectures: Mapping[str | None, str]
    prefix: str
    names: Mapping[str, str]
    block: str
    heads: Mapping[str | None, Mapping[str, str]] = field(default_factory=dict)
    transposed: bool = True
    ignored: str = r"a^"  # nothing


_GPT2 = Family(
    model_type="gpt2",
    model=Decoder,
    keys={
        "vocab_size": "vocab_size",
        "width": "n_embd",
        "depth": "n_layer",
        "num_heads": "n_head",
        "mlp_width": "n_inner",
        "max_length": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "activation": "activation_function",
        "tied": "tie_word_embeddings",
    },
    defaults={
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    required={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    fixed={
        "positions": "learned",
        "norm": "layer",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "gated": False,
    },
    architectures={None: "GPT2LMHeadModel"},
    prefix="transformer.",
    block="h.",
    names={
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "final_norm": "ln_f",
        "head": ":lm_head",
        "attention_norm": "ln_1",
        "attention/query": "attn.c_attn",
        "attention/key": "attn.c_attn",
        "attention/value": "attn.c_attn",
        "attention/out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp/in": "mlp.c_fc",
        "mlp/out": "mlp.c_proj",
    },
    transposed=False,  # but the head, see `is_transposed`
    ignored=r"(.*\.)?h\.\d+\.attn\.(masked_)?bias",
)

_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
    "tied": "tie_word_embeddings",
}
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_LLAMA_FIXED = {"positions": "rotary", "norm": "rms", "qk_norm": False, "gated": True}
_LLAMA_NAMES = {
    "token_embedding": "embed_tokens",
    "final_norm": "norm",
    "head": ":lm_head",
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "attention/out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/in": "mlp.up_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/out": "mlp.down_proj",
}


def _llama(model_type: str, architecture: str, **differences: Any) -> Family:
    fields: dict[str, Any] = {
        "keys": _LLAMA_KEYS,
        "defaults": _LLAMA_DEFAULTS,
        "required": {},
        "fixed": _LLAMA_FIXED,
    }
    for name, changes in differences.items():
        fields[name] = {**fields[name], **changes}
    return Family(
        model_type=model_type,
        model=Decoder,
        architectures={None: architecture},
        prefix="model.",
        block="layers.",
        names=_LLAMA_NAMES,
        ignored=r"(.*\.)?rotary_emb\.inv_freq",
        **fields,
    )


_BIAS_KEYS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_LLAMA = _llama(
    "llama",
    "LlamaForCausalLM",
    keys={**_BIAS_KEYS, "mlp_bias": "mlp_bias"},
    defaults={"attention_bias": False, "mlp_bias": False},
)
_QWEN2 = _llama(
    "qwen2",
    "Qwen2ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
    required={"use_sliding_window": False},
    fixed={"qkv_bias": True, "out_bias": False, "mlp_bias": False},
)
_QWEN3 = _llama(
    "qwen3",
    "Qwen3ForCausalLM",
    keys=_BIAS_KEYS,
    defaults={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
    required={"use_sliding_window": False},
    fixed={"mlp_bias": False, "qk_norm": True},
)

_BERT_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings",
    "num_token_types": "type_vocab_size",
    "norm_epsilon": "layer_norm_eps",
    "activation": "hidden_act",
}
_BERT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
_BERT_REQUIRED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}
_BERT_NAMES = {
    "token_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "type_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/in": "intermediate.dense",
    "mlp/out": "output.dense",
    "mlp_norm": "output.LayerNorm",
    "pooler_dense": "pooler.dense",
    "classifier": ":classifier",
}
_BERT = Family(
    model_type="bert",
    model=Encoder,
    keys=_BERT_KEYS,
    defaults=_BERT_DEFAULTS,
    required=_BERT_REQUIRED,
    fixed={"position_offset": 0},
    architectures={
        None: "BertModel",
        "tokens": "BertForTokenClassification",
        "sequence": "BertForSequenceClassification",
        "masked_lm": "BertForMaskedLM",
    },
    prefix="bert.",
    block="encoder.layer.",
    names={
        **_BERT_NAMES,
        "masked_lm_dense": ":cls.predictions.transform.dense",
        "masked_lm_norm": ":cls.predictions.transform.LayerNorm",
        "masked_lm_bias": ":cls.predictions.bias",
    },
    ignored=r"(.*\.)?embeddings\.position_ids|cls\.(seq_relationship|predictions\.decoder)\..*",
)
_XLM_ROBERTA = Family(
    model_type="xlm-roberta",
    model=Encoder,
    keys=_BERT_KEYS,
    defaults=_BERT_DEFAULTS,
    required={**_BERT_REQUIRED, "pad_token_id": 1, "hidden_act": "gelu"},
    # The first position is that of padding, pad_token_id, plus 1.
    fixed={"position_offset": 2, "activation": "gelu"},
    architectures={
        None: "XLMRobertaModel",
        "tokens": "XLMRobertaForTokenClassification",
        "sequence": "XLMRobertaForSequenceClassification",
        "masked_lm": "XLMRobertaForMaskedLM",
    },
    prefix="roberta.",
    block="encoder.layer.",
    names={
        **_BERT_NAMES,
        "masked_lm_dense": ":lm_head.dense",
        "masked_lm_norm": ":lm_head.layer_norm",
        "masked_lm_bias": ":lm_head.bias",
    },
    heads={
        "sequence": {"pooler_dense": ":classifier.dense", "classifier": ":classifier.out_proj"},
    },
    ignored=r"(.*\.)?embeddings\.position_ids|lm_head\.decoder\..*",
)

FAMILIES = {
    family.model_type: family for family in (_GPT2, _LLAMA, _QWEN2, _QWEN3, _BERT, _XLM_ROBERTA)
}

# transformers' names of activations, and ours. The first of equal ones is written.
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
