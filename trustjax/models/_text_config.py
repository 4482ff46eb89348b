"""config.json of a text model: it is checked, turned into fields of a module, and written."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trustjax._checks import FieldError
from trustjax._files import read_json
from trustjax.models._families import ACTIVATION_NAMES, FAMILIES, Family
from trustjax.models._rotary import RopeScaling
from trustjax.models._store import FLOAT32, CheckpointError, check_size, is_number, wrong
from trustjax.models.encoder import Encoder
from trustjax.models.transformer import Decoder

# Keys that go from a checkpoint to the ones that are fine-tuned from it.
KEPT_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id")


def read_text_config(path: Path) -> tuple[Family, dict[str, Any]]:
    """The family, and config.json with its defaults. Raises CheckpointError for what is wrong."""
    config = read_json(path, CheckpointError)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        names = ", ".join(repr(name) for name in FAMILIES)
        raise wrong(path, "model_type", f"one of {names}", kind)
    family = FAMILIES[kind]
    for name, only in family.required.items():
        if config.get(name, only) != only:
            raise wrong(path, name, repr(only), config[name])
    config = {**family.defaults, **config}
    for name in set(family.keys.values()):
        _check_value(path, name, family.defaults[name], config[name])
    activation = family.keys["activation"]
    if config[activation] not in ACTIVATION_NAMES:
        names = ", ".join(repr(name) for name in ACTIVATION_NAMES)
        raise wrong(path, activation, f"one of {names}", config[activation])
    return family, config


def _check_value(path: Path, name: str, default: Any, value: Any) -> None:
    if isinstance(default, bool | str):
        if type(value) is not type(default):
            raise wrong(path, name, type(default).__name__, value)
    elif isinstance(default, float):
        if not is_number(value, at_least=float(FLOAT32.tiny)):
            raise wrong(path, name, "a float32 above 0", value)
    elif value is not None or default is not None:
        check_size(path, name, value)


def module_fields(path: Path, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the family's module, but those of a head. Raises CheckpointError."""
    fields = {name: config[key] for name, key in family.keys.items()} | dict(family.fixed)
    fields["activation"] = ACTIVATION_NAMES[fields["activation"]]
    fields["norm_epsilon"] = float(fields["norm_epsilon"])
    if fields["mlp_width"] is None:
        fields["mlp_width"] = 4 * fields["width"]
    fields["max_length"] -= fields.get("position_offset", 0)
    if fields.get("positions") == "rotary":
        fields |= _rope(path, config)
    try:
        model = family.model(**fields)
    except FieldError as error:  # heads that do not divide
        raise CheckpointError(f"{path}: {_keyed(error, family)}") from error
    if isinstance(model, Decoder):
        fields["num_kv_heads"], fields["head_dim"] = model.kv_sizes
    return fields


def _keyed(error: FieldError, family: Family) -> str:
    """An error about one of our fields in the words of config.json."""
    text = str(error)
    for name, key in family.keys.items():
        if error.field == name:
            return text.replace(name, key, 1)
    return text


def _rope(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and stretch of the rotary positions; transformers 5 has both in `rope_parameters`."""
    newer, older = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    for name, each in (("rope_parameters", newer), ("rope_scaling", older)):
        if not isinstance(each, dict):
            raise wrong(path, name, "an object", each)
    rope = newer or older
    if newer and older and _stretch(newer) != _stretch(older):
        raise wrong(path, "rope_scaling", f"the same as rope_parameters, {newer}", older)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not is_number(theta, at_least=float(FLOAT32.tiny)):
        raise wrong(path, "rope_theta", "a float32 above 0", theta)
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if fraction != 1:
        raise wrong(path, "partial_rotary_factor", "1", fraction)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind not in ("linear", "llama3"):
        raise wrong(path, "rope_type", "'default', 'linear' or 'llama3'", kind)
    try:
        numbers = {field: rope[key] for field, key in _ROPE_KEYS[kind].items()}
        for field, value in numbers.items():
            if not is_number(value, at_least=float(FLOAT32.tiny)):
                raise wrong(path, _ROPE_KEYS[kind][field], "a float32 above 0", value)
        return {"rope_theta": float(theta), "rope_scaling": RopeScaling(kind, **numbers)}
    except KeyError as error:
        raise CheckpointError(f"{path}: {error} is missing for rope_type {kind!r}") from error
    except FieldError as error:
        raise CheckpointError(f"{path}: rope_scaling: {error}") from error


def _stretch(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What stretches the positions: all but the base."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    rest = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta")}
    return {"rope_type": kind, **rest}


_ROPE_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_length": "original_max_position_embeddings",
    },
}


def family_of(model: Decoder | Encoder) -> Family:
    """The family that has a model's layers. Raises ValueError if there is none."""
    for family in FAMILIES.values():
        if isinstance(model, family.model) and _fits(model, family):
            return family
    raise FieldError(
        "model", f"have the layers of one of {', '.join(FAMILIES)}", reprlib.repr(model)
    )


def _fits(model: Decoder | Encoder, family: Family) -> bool:
    if any(getattr(model, name) != value for name, value in family.fixed.items()):
        return False
    written: dict[str, Any] = {}  # two fields may share a key
    if any(written.setdefault(key, value) != value for key, value in _values(model, family)):
        return False
    heads_are_plain = not isinstance(model, Decoder) or (
        "head_dim" in family.keys
        or model.kv_sizes == (model.num_heads, model.width // model.num_heads)
    )
    types_exist = not isinstance(model, Encoder) or model.num_token_types > 0
    return heads_are_plain and types_exist


def _values(model: Decoder | Encoder, family: Family) -> list[tuple[str, Any]]:
    fields = {name: getattr(model, name) for name in family.keys}
    if isinstance(model, Decoder):
        kv_heads, head_dim = model.kv_sizes
        fields |= {"num_kv_heads": kv_heads, "head_dim": head_dim}
    activation = next(k for k, ours in ACTIVATION_NAMES.items() if ours == model.activation)
    fields["activation"] = activation
    fields["max_length"] += family.fixed.get("position_offset", 0)
    return [(key, fields[name]) for name, key in family.keys.items()]


def text_config(
    model: Decoder | Encoder, family: Family, before: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """What config.json says of a model; of the one `before` it keeps the special tokens."""
    head = getattr(model, "head", None) if isinstance(model, Encoder) else None
    config = {
        "architectures": [family.architectures[head]],
        "model_type": family.model_type,
        **{key: before[key] for key in KEPT_KEYS if key in before},
        **dict(_values(model, family)),
        **family.required,
        "dtype": dtype,
    }
    if isinstance(model, Encoder) and model.num_classes:
        if len(config.get("id2label") or {}) != model.num_classes:
            labels = {str(index): f"LABEL_{index}" for index in range(model.num_classes)}
            config |= {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
    else:
        config = {k: v for k, v in config.items() if k not in ("id2label", "label2id")}
    if isinstance(model, Decoder) and model.positions == "rotary":
        rope: dict[str, Any] = {"rope_type": "default"}
        if (scaling := model.rope_scaling) is not None:
            keys = _ROPE_KEYS[scaling.kind]
            rope = {"rope_type": scaling.kind} | {k: getattr(scaling, f) for f, k in keys.items()}
            config["rope_scaling"] = rope  # read by transformers 4, as is rope_theta
        config["rope_theta"] = model.rope_theta
        config["rope_parameters"] = {**rope, "rope_theta": model.rope_theta}
    return config
