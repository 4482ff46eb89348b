"""Which leaves of a parameter tree `auon` treats as matrices, and which of their axes are inputs.

The decision rests on the names of a leaf (keys, attributes, module paths), its shape, and its
siblings: the bias beside a kernel tells which axes are outputs, and so do the heads of an
attention. `describe_labels` prints the decision for each leaf, with the reason.
"""

import collections
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.tree_util import GetAttrKey, keystr
from optax.contrib import MuonDimensionNumbers

from trustjax._dtypes import is_floating

PyTree = Any
Shape = tuple[int, ...]
Axes = tuple[tuple[int, ...], tuple[int, ...]]

_KERNEL_WORDS = {"kernel", "weight", "weights", "w"}
_BIAS_WORDS = {"bias", "biases", "b"}
_NORM_WORDS = {"ln", "bn", "gn", "rms", "normalization", "normalisation"}
_ATTENTION_WORDS = {"q", "k", "v", "o", "query", "key", "attn", "attention", "multi"}
_TO_HEADS = {"q", "k", "v", "query", "key", "value", "wq", "wk", "wv"}
_FROM_HEADS = {"o", "out", "output", "wo"}
_LAYER_WORDS = {"proj", "projection", "dense", "linear", "attention", "attn"}


# ---- names


@functools.cache
def _tokens(name: str) -> tuple[str, ...]:
    """The lower-case words and numbers of a name: "LMHead_0" is lm, head, 0."""
    found = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", name)
    return tuple(token.lower() for token in found)


def _words(name: str) -> tuple[str, ...]:
    return tuple(token for token in _tokens(name) if not token.isdigit())


def _stem(name: str) -> tuple[str, ...]:
    """The part of a name that a kernel shares with its bias: "q" for "w_q" and "b_q"."""
    return tuple(token for token in _tokens(name) if token not in _KERNEL_WORDS | _BIAS_WORDS)


@dataclass(frozen=True)
class _Leaf:
    """One leaf with what its surroundings tell about it.

    Attributes:
      path: The path of the leaf, as JAX prints it.
      names: The names of the modules around the leaf, and its own.
      shape: The shape of the leaf.
      has_gradient: Whether it holds floating-point numbers, at least one.
      siblings: The shapes of "kernel" and "bias" in the same layer, if there are any.
      relatives: The shapes of the kernels beside the layer, by the words of their layers, such as
        those of one attention.
      shared: The number of leading names that all leaves share. These say nothing about a leaf.
    """

    path: str
    names: tuple[str, ...]
    shape: Shape
    has_gradient: bool
    siblings: dict[str, Shape]
    relatives: dict[tuple[str, ...], Shape]
    shared: int

    @property
    def name(self) -> str:
        return self.names[-1] if self.names else ""

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """The words of each name, except "kernel" and its synonyms, of names that have others."""
        return [words for words, _ in _parts(self.names)]

    @property
    def role(self) -> tuple[str, ...]:
        """The words of the last name that says more than "kernel"."""
        return self.parts[-1] if self.parts else ()

    @property
    def own_parts(self) -> list[tuple[str, ...]]:
        """The `parts` without the names that all leaves share."""
        return [words for words, index in _parts(self.names) if index >= self.shared]


def _parts(names: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    last = len(names) - 1
    found = []
    for index, name in enumerate(names):
        words = _words(name)
        if index == last:
            words = tuple(word for word in words if word not in _KERNEL_WORDS)
        if words:
            found.append((words, index))
    return found


def _kind(name: str) -> Literal["kernel", "bias"] | None:
    words = set(_words(name))
    return "kernel" if words & _KERNEL_WORDS else "bias" if words & _BIAS_WORDS else None


def _leaves(params: PyTree) -> list[_Leaf]:
    """The leaves of `params` in the order of `jax.tree.leaves`."""
    paths = jax.tree.leaves_with_path(params)
    children = collections.Counter(path[:-1] for path, _ in paths)
    all_names = [_names(path, children) for path, _ in paths]
    shapes = [tuple(np.shape(leaf)) for _, leaf in paths]

    siblings: dict[Any, dict[str, Shape]] = collections.defaultdict(dict)
    relatives: dict[Any, dict[tuple[str, ...], Shape]] = collections.defaultdict(dict)
    for names, shape in zip(all_names, shapes, strict=True):
        if kind := _kind(names[-1] if names else ""):
            siblings[names[:-1], _stem(names[-1])][kind] = shape
        if kind != "bias" and (parts := _parts(names)):
            words, index = parts[-1]
            relatives[names[:index]][words] = shape

    shared = _shared(all_names)
    found = []
    for names, shape, (path, leaf) in zip(all_names, shapes, paths, strict=True):
        parts, name = _parts(names), names[-1] if names else ""
        found.append(
            _Leaf(
                path=keystr(path),
                names=names,
                shape=shape,
                has_gradient=is_floating(leaf) and math.prod(shape) > 0,
                siblings=siblings[names[:-1], _stem(name) if _kind(name) else ()],
                relatives=relatives[names[: parts[-1][1]]] if parts else {},
                shared=shared,
            )
        )
    return found


def _names(path: tuple[Any, ...], children: collections.Counter[Any]) -> tuple[str, ...]:
    """The names in a path, in which one key may hold several, as "mlp/~/linear_0" does in Haiku."""
    # An attribute `value` at the end is that of an NNX variable; a key may be a layer of attention.
    if path and path[-1] == GetAttrKey("value") and children[path[:-1]] == 1:
        path = path[:-1]
    whole = "/".join(keystr((key,), simple=True) for key in path)
    return tuple(name for name in re.split(r"[/.]", whole) if _tokens(name))


def _shared(all_names: list[tuple[str, ...]]) -> int:
    """The number of leading names that all leaves share, if they belong to more than one layer."""
    layers = {names[:-1] for names in all_names}
    if len(layers) < 2:
        return 0
    columns = zip(*layers, strict=False)
    return next(
        (index for index, column in enumerate(columns) if len(set(column)) > 1),
        min(map(len, layers)),
    )


# ---- rules


def _is_norm(words: tuple[str, ...]) -> bool:
    return any(word.endswith("norm") or word in _NORM_WORDS for word in words)


def _in_norm(leaf: _Leaf) -> bool:
    """Whether the leaf or its parent is a norm. A leaf named "kernel" never belongs to one."""
    around = leaf.names[-2:] if leaf.name != "kernel" else ()
    return any(_is_norm(_words(name)) for name in around)


def _named_bias(leaf: _Leaf) -> bool:
    words = _words(leaf.name)
    if "lora" in {word for name in leaf.names[-2:] for word in _words(name)}:
        return False  # lora_b is the second factor
    if "bias" in (words[:1] + words[-1:]):
        return True
    return words[:1] == ("b",) and leaf.name.startswith("b")  # B is a matrix of a state space


def _shaped_like_bias(leaf: _Leaf) -> bool:
    """Whether the leaf has the shape of the trailing axes of a kernel beside it with more axes."""
    kernel = leaf.siblings.get("kernel", ())
    return _kind(leaf.name) != "kernel" and len(kernel) > len(leaf.shape) > 0 and (
        kernel[-len(leaf.shape) :] == leaf.shape
    )  # fmt: skip


def _is_scale(leaf: _Leaf) -> bool:
    as_its_bias = _kind(leaf.name) == "kernel" and leaf.siblings.get("bias") == leaf.shape
    return leaf.role[-1:] in {(x,) for x in ("scale", "gamma", "beta", "offset")} or as_its_bias


def _is_embedding(leaf: _Leaf) -> bool:
    words = {word for part in leaf.parts for word in part}
    return any("embed" in word or word.endswith("emb") or word in ("wte", "wpe") for word in words)


def _is_token_or_position(leaf: _Leaf) -> bool:
    """By the name of the leaf, or by the name of its layer if the leaf is only called a weight."""
    role = leaf.role if leaf.parts and leaf.role == _own_words(leaf) else leaf.role[-1:]
    is_position = any(word == "pos" or word.startswith("posit") for word in role)
    return is_position or leaf.role[-1:] in {("token",), ("tokens",), ("cls",)}


def _own_words(leaf: _Leaf) -> tuple[str, ...]:
    return tuple(word for word in _words(leaf.name) if word not in _KERNEL_WORDS)


def _is_head(leaf: _Leaf) -> bool:
    """Whether the outputs of the layer are those of the model."""

    def names_head(words: tuple[str, ...]) -> bool:
        found = set(words)
        return (
            bool(found & {"classifier", "logits", "predictions", "readout"})
            or ("lm" in found and bool(found & {"out", "head", "output"}))
            or (words[-1] == "head" and not found & _ATTENTION_WORDS)
        )

    own = leaf.own_parts
    return any(map(names_head, own)) or own[:1] == [("output",)]


# The first reason that holds gives a leaf the label "other".
_OTHER: tuple[tuple[str, Callable[[_Leaf], bool]], ...] = (
    ("no gradient", lambda leaf: not leaf.has_gradient),
    ("fewer than two axes", lambda leaf: len(leaf.shape) < 2),
    ("bias, by its name", _named_bias),
    ("bias, by its shape", _shaped_like_bias),
    ("normalization", _in_norm),
    ("scale or offset", _is_scale),
    ("embedding", _is_embedding),
    ("token or position", _is_token_or_position),
    ("head", _is_head),
)


def _decision(leaf: _Leaf) -> tuple[Literal["auon", "other"], str]:
    """The label of a leaf and the reason for it."""
    for reason, holds in _OTHER:
        if holds(leaf):
            return "other", reason
    return "auon", _axes(leaf)[1]


# ---- the matrix in a leaf


def _axes(leaf: _Leaf) -> tuple[Axes, str]:
    """The axes of the inputs and of the outputs of the matrix in a leaf, and how they are known.

    Other axes count separate matrices, such as the layers of a scan.
    """
    rank = len(leaf.shape)
    last = tuple(range(rank))
    torch_like = leaf.name.startswith("weight")
    is_convolution = any(w.startswith("conv") or w == "stem" for w in leaf.role) and rank > 2
    if heads := _attention_axes(leaf):
        return heads, "attention"
    bias = leaf.siblings.get("bias")
    if bias and (found := _axes_by_bias(leaf.shape, bias, torch_like)):
        return found, "matrix, axes by its bias"
    if is_convolution:
        return (last[1:], last[:1]) if torch_like else (last[:-1], last[-1:]), "convolution"
    pair = last[-2:-1], last[-1:]
    if torch_like:
        return (pair[1], pair[0]), "matrix, outputs first"
    return pair, "matrix"


def _attention_axes(leaf: _Leaf) -> Axes | None:
    """The axes of an attention kernel; None if the leaf is none.

    Such a kernel is (inputs, heads, size) or (heads, size, outputs), or a stack of these. The heads
    of the layers around it and the shape of its bias must agree with that.
    """
    rank = len(leaf.shape)
    own = _heads_side(leaf.role)
    if own is None or rank < 3:
        return None
    heads: dict[str, list[Shape]] = {"to": [], "from": []}
    for words, shape in leaf.relatives.items():
        if side := _heads_side(words):
            heads[side].append(shape[-3:-1] if side == "from" else shape[-2:])
    # Keys and values may have fewer heads than queries and outputs.
    of_own = leaf.shape[-3:-1] if own == "from" else leaf.shape[-2:]
    is_shared = (heads["to"] + heads["from"]).count(of_own) > 1
    agree = is_shared and set(heads["from"]) <= set(heads["to"])
    outputs = 1 if own == "from" else 2
    bias = leaf.siblings.get("bias")
    fits = not bias or (bias[-outputs:], len(bias)) == (leaf.shape[-outputs:], rank - 3 + outputs)
    if not agree or not fits:
        return None
    axes = (rank - 3, rank - 2, rank - 1)
    return axes[: 3 - outputs], axes[3 - outputs :]


def _heads_side(words: tuple[str, ...]) -> Literal["to", "from"] | None:
    """Whether a layer of these words leads "to" the heads of an attention or "from" them."""
    left = set(words) - _LAYER_WORDS - _KERNEL_WORDS
    if len(left) != 1:
        return None
    return "to" if left <= _TO_HEADS else "from" if left <= _FROM_HEADS else None


def _axes_by_bias(shape: Shape, bias: Shape, torch_like: bool, stack: int = 0) -> Axes | None:
    """The axes by the shape of the bias; None if it fits no axes of the kernel.

    The axes that have the sizes of the bias are the outputs. If kernel and bias begin with axes of
    the same size, these are a stack: `stack` of them are already taken off both shapes.
    """
    rank = len(shape)
    axes = tuple(range(stack, stack + rank))
    without_ones = bias
    while len(without_ones) > 1 and without_ones[-1] == 1:
        without_ones = without_ones[:-1]  # (outputs, 1, 1) of a convolution in Equinox
    if torch_like and rank > 2 and shape[1] != 1:
        bias = without_ones
    if len(bias) == 1:
        for axis in (0, 1) if torch_like else (rank - 1, 0):
            if rank > 1 and shape[axis] == bias[0]:
                return axes[:axis] + axes[axis + 1 :], axes[axis : axis + 1]
        return None
    is_stack = len(bias) < rank and shape[0] == bias[0]
    if is_stack and (found := _axes_by_bias(shape[1:], bias[1:], torch_like, stack + 1)):
        return found
    if len(bias) < rank and shape[-len(bias) :] == bias:
        return axes[: -len(bias)], axes[-len(bias) :]
    if bias != without_ones:
        return _axes_by_bias(shape, without_ones, torch_like, stack)
    return None


def matrix_numbers(params: PyTree) -> PyTree:
    """The `optax.contrib.MuonDimensionNumbers` of each leaf; None if it has fewer than two axes.

    Raises ValueError where the axes of a leaf are not known, as its bias is hidden.
    """
    hidden = _hidden_biases(params)
    for leaf in _leaves(params):
        if len(leaf.shape) > 2 and _layer(leaf.names) in hidden and _attention_axes(leaf) is None:
            raise ValueError(
                f"auon does not see the bias beside params{leaf.path}, which tells the axes of its "
                "matrices: optax.masked and optax.partition hide it. Put auon around the whole "
                "tree, auon(..., other=..., label_fn=...), or pass dimension_numbers"
            )

    def numbers(leaf: _Leaf) -> MuonDimensionNumbers | None:
        return MuonDimensionNumbers(*_axes(leaf)[0]) if len(leaf.shape) > 1 else None

    return jax.tree.unflatten(jax.tree.structure(params), map(numbers, _leaves(params)))


def _layer(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a kernel and its bias share."""
    return names[:-1], _stem(names[-1] if names else "")


def _hidden_biases(params: PyTree) -> set[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The layers whose bias is an `optax.MaskedNode`."""
    nodes = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    all_names = [
        _names(path, collections.Counter())
        for path, node in nodes
        if isinstance(node, optax.MaskedNode)
    ]
    return {_layer(names) for names in all_names if names and _kind(names[-1]) == "bias"}


def matrix_labels(params: PyTree) -> PyTree:
    """The labels of a model for `auon`: "auon" for its matrices, "other" for its other leaves.

    The other leaves are those with fewer than two axes or without a gradient, biases (of any number
    of axes), scales and offsets of norms, embeddings of tokens and positions, and heads. Names and
    shapes decide, by the conventions of Flax, Equinox, Haiku, Keras and PyTorch; `describe_labels`
    prints each decision. Leaves may be arrays or `jax.ShapeDtypeStruct`.
    """
    labels = [_decision(leaf)[0] for leaf in _leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def describe_labels(params: PyTree) -> str:
    """A table of how `auon` treats each leaf by default, to be printed once.

    Its columns are the path of the leaf, its shape, its label, the reason for the label, and the
    matrix in it: the axes of the inputs | the axes of the outputs: the sizes of both. "3 of 8 x 4"
    means three matrices in one leaf. Leaves may be arrays or `jax.ShapeDtypeStruct`.

    >>> import jax.numpy as jnp
    >>> print(describe_labels({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}))
    path                 shape   label  reason                    inputs | outputs
    ['dense']['bias']    (3,)    other  fewer than two axes
    ['dense']['kernel']  (2, 3)  auon   matrix, axes by its bias  0 | 1: 2 x 3
    """
    rows = [("path", "shape", "label", "reason", "inputs | outputs")]
    for leaf in _leaves(params):
        label, reason = _decision(leaf)
        matrix = _matrix_text(leaf) if label == "auon" else ""
        rows.append((leaf.path, str(leaf.shape), label, reason, matrix))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def _matrix_text(leaf: _Leaf) -> str:
    axes, _ = _axes(leaf)
    sides = [math.prod(leaf.shape[axis] for axis in side) for side in axes]
    number = math.prod(leaf.shape) // math.prod(sides)
    where = " | ".join(", ".join(map(str, side)) for side in axes)
    return f"{where}: {f'{number} of ' if number > 1 else ''}{sides[0]} x {sides[1]}"
