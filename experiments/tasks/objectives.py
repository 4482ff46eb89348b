"""What is trained: how a batch becomes outputs, which labels they should give, and what is noised.

An objective is all that `experiments.tasks.supervised` needs to know of a network and its data. Its
batches are mappings of arrays. Images have one label each; texts have one for each token, and a
mask of the tokens that count.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.tasks.language_model import Network

PyTree = Any
Batch = Mapping[str, jax.Array]


class Objective(Protocol):
    """A network and the classes that it should give to the examples or tokens of a batch."""

    @property
    def frozen(self) -> PyTree:
        """Weights that all lanes share and none trains: an argument of compiled programs."""

    @property
    def trainable(self) -> Callable[[PyTree], PyTree] | None:
        """Which of the parameters are trained, as a tree of bools; None for all."""

    def initial(self, keys: jax.Array) -> tuple[PyTree, PyTree]:
        """Parameters and other collections, with a leading axis for `keys`."""

    def outputs(
        self,
        frozen: PyTree,
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        noise_key: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """Logits [..., classes], and the other collections after the pass.

        `key` is that of dropout; without it the network is in evaluation mode. With `noise_key` the
        inputs are noised.
        """

    def labels(self, batch: Batch) -> jax.Array:
        """Classes of the examples or tokens, int32 [...]."""

    def where(self, batch: Batch) -> jax.Array | None:
        """The examples or tokens that count, bool [...]; None for all."""

    def features(
        self, frozen: PyTree, params: PyTree, model_state: PyTree, batch: Batch
    ) -> jax.Array:
        """What enters the head, one row for each example, [examples, features]."""


def mean_loss(objective: Objective, logits: jax.Array, batch: Batch) -> jax.Array:
    """Mean cross-entropy in nats of the examples or tokens that count, []."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, objective.labels(batch))
    return jnp.mean(losses, where=objective.where(batch))


def accuracy(objective: Objective, logits: jax.Array, batch: Batch) -> jax.Array:
    """Share of right classes among the examples or tokens that count, []."""
    right = jnp.argmax(logits, -1) == objective.labels(batch)
    return jnp.mean(right, where=objective.where(batch))


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: batches {"image": [examples, ...] in [0, 1], "label": [examples]}.

    Attributes:
      model: Flax module, `model.apply(variables, images, train=...)`.
      input_noise: Standard deviation of the Gaussian noise on images.
      example: An image, [1, ...], which gives the shapes; None if `initial` is not called.
    """

    model: nn.Module
    input_noise: float = 0.0
    example: jax.Array | None = None

    @property
    def frozen(self) -> PyTree:
        """Nothing: frozen blocks are part of the parameters, and `trainable` leaves them out."""
        return {}

    @property
    def trainable(self) -> Callable[[PyTree], PyTree] | None:
        """All but the frozen blocks of a pre-trained model."""
        model: Any = self.model
        return None if getattr(model, "frozen_blocks", None) is None else model.trainable

    def initial(self, keys: jax.Array) -> tuple[PyTree, PyTree]:
        """What a pre-trained model loads is the same for all keys."""
        model: Any = self.model
        loaded = model.load_pretrained() if hasattr(model, "load_pretrained") else {}

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, None))
        def init(key: jax.Array, loaded: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
            variables = dict(model.init({"params": key, "dropout": key}, self.example))
            params = variables.pop("params")
            return {**params, **loaded}, variables

        variables: tuple[PyTree, PyTree] = init(keys, loaded)
        return variables

    def outputs(
        self,
        frozen: PyTree,
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        noise_key: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """In training mode with new batch statistics, in evaluation mode with the running ones."""
        image, variables = batch["image"], {"params": params, **model_state}
        if noise_key is not None:
            image = image + self.input_noise * jax.random.normal(noise_key, image.shape)
        if key is None:
            return jnp.asarray(self.model.apply(variables, image)), model_state
        logits, model_state = self.model.apply(
            variables, image, train=True, rngs={"dropout": key}, mutable=list(model_state)
        )
        return jnp.asarray(logits), model_state

    def labels(self, batch: Batch) -> jax.Array:
        """The classes of the images."""
        return batch["label"]

    def where(self, batch: Batch) -> None:
        """All images count."""

    def features(
        self, frozen: PyTree, params: PyTree, model_state: PyTree, batch: Batch
    ) -> jax.Array:
        """The model's own features."""
        variables = {"params": params, **model_state}
        _, found = self.model.apply(variables, batch["image"], return_features=True)
        return jnp.asarray(found)


@dataclass(frozen=True, eq=False)
class NextToken:
    """Language modelling: batches as `trustjax.data.PackedTokens` has them.

    Attributes:
      network: Decoder, whose weights may have a frozen part.
      input_noise: Standard deviation of the Gaussian noise on the embeddings of tokens.
    """

    network: Network
    input_noise: float = 0.0

    @property
    def frozen(self) -> PyTree:
        """The checkpoint below LoRA; empty if all weights are trained."""
        return self.network.frozen

    @property
    def trainable(self) -> None:
        """All parameters, of which the frozen weights are none."""

    def initial(self, keys: jax.Array) -> tuple[PyTree, PyTree]:
        """The part of the weights that is trained."""
        return self.network.init(keys), {}

    def outputs(
        self,
        frozen: PyTree,
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        noise_key: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """Logits of the next token at every token, [rows, length, vocabulary]."""
        logits = apply_text(
            self.network.model,
            self.network.params(frozen, params),
            batch,
            key=key,
            noise_key=noise_key,
            input_noise=self.input_noise,
        )
        return logits, model_state

    def labels(self, batch: Batch) -> jax.Array:
        """The next tokens."""
        return batch["targets"]

    def where(self, batch: Batch) -> jax.Array:
        """Tokens that have a next one in their document."""
        return batch["mask"]

    def features(
        self, frozen: PyTree, params: PyTree, model_state: PyTree, batch: Batch
    ) -> jax.Array:
        """What enters the head at every token, one row for each."""
        weights = self.network.params(frozen, params)
        hidden = apply_text(self.network.model, weights, batch, method="hidden")
        return hidden.reshape(-1, hidden.shape[-1])


def apply_text(
    model: nn.Module,
    params: PyTree,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    noise_key: jax.Array | None = None,
    input_noise: float = 0.0,
    method: str | None = None,
) -> jax.Array:
    """Outputs of a `Decoder` or `Encoder` for a batch with "tokens", "segments" and "positions".

    With `noise_key` Gaussian noise is added to the embeddings of the tokens, the place of the noise
    in TRAM and R3F, arXiv:2310.03646 and arXiv:2008.03156.
    """

    def with_noise(
        embed: Callable[..., Any],
        arguments: Any,
        keywords: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        embedded = embed(*arguments, **keywords)
        is_tokens = context.module.name == "token_embedding" and context.method_name == "__call__"
        if noise_key is None or not is_tokens:
            return embedded
        noise = jax.random.normal(noise_key, embedded.shape, embedded.dtype)
        return embedded + input_noise * noise

    training: dict[str, Any] = {} if key is None else {"train": True, "rngs": {"dropout": key}}
    with nn.intercept_methods(with_noise):
        outputs: Any = model.apply(
            {"params": params},
            batch["tokens"],
            segments=batch["segments"],
            positions=batch["positions"],
            method=method,
            **training,
        )
    return jnp.asarray(outputs)
