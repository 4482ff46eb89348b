r"""Attention over the neighbours in a graph, and the value network of GA-MATR.

Velickovic et al., Graph Attention Networks, arXiv:1710.10903; Brody, Alon, Yahav, How Attentive are
Graph Attention Networks?, arXiv:2105.14491. For a receiver i and the senders j that it hears:

    GAT     e_ij = LeakyReLU(a_r . W h_i + a_s . W h_j)
    GATv2   e_ij = a . LeakyReLU(W_1 h_i + W_2 h_j)
    alpha_ij = softmax_j(e_ij),    h'_i = sum_j alpha_ij z_j

with z_j = W h_j, which for GATv2 is W_2 h_j, and LeakyReLU of slope 0.2. In plain GAT the order of
the senders by attention is the same for all receivers.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trustjax._checks import check_choice, check_count
from trustjax._dtypes import widened
from trustjax.models.actor_critic import Carry, Torso, column_dot_general, default_float, orthogonal
from trustjax.models.mlp import ACTIVATIONS

SCORES = ("gat", "gatv2", "mean")
SLOPE = 0.2
_EXCLUDED = -1e9  # its exponential is 0; minus infinity in a whole row would be NaN


def gat_scores(
    receivers: jax.Array, senders: jax.Array, at_receiver: jax.Array, at_sender: jax.Array
) -> jax.Array:
    r"""Scores of GAT.

    .. math:: \mathrm{LeakyReLU}(a_r^\top z_i + a_s^\top z_j)

    Args:
      receivers: z_i, float [..., r, d].
      senders: z_j, float [..., s, d].
      at_receiver: a_r, float [d].
      at_sender: a_s, float [d].

    Returns:
      Scores [..., r, s].

    Source: arXiv:1710.10903, Eq. 3, with a = [a_r, a_s].
    """
    sums = (receivers @ at_receiver)[..., :, None] + (senders @ at_sender)[..., None, :]
    return jax.nn.leaky_relu(sums, SLOPE)


def gatv2_scores(receivers: jax.Array, senders: jax.Array, attention: jax.Array) -> jax.Array:
    r"""Scores of GATv2.

    .. math:: a^\top \mathrm{LeakyReLU}(z_i + z_j)

    Args:
      receivers: z_i = W_1 h_i, float [..., r, d].
      senders: z_j = W_2 h_j, float [..., s, d].
      attention: a, float [d].

    Returns:
      Scores [..., r, s].

    Source: arXiv:2105.14491, Eq. 7.
    """
    sums = receivers[..., :, None, :] + senders[..., None, :, :]
    return jax.nn.leaky_relu(sums, SLOPE) @ attention


def attention_weights(scores: jax.Array, edges: jax.Array) -> jax.Array:
    """The softmax over the senders that are heard, [..., r, s], in float32 at least.

    Args:
      scores: Scores, float [..., r, s].
      edges: Whether receiver i hears sender j, bool [..., r, s]. A receiver that hears nobody hears
        all equally.
    """
    scores = widened(scores)
    return jax.nn.softmax(jnp.where(edges, scores, jnp.asarray(_EXCLUDED, scores.dtype)), -1)


class GraphAttention(nn.Module):
    """One layer of attention with several heads, whose results stand side by side.

    Attributes:
      heads: Number of heads, >= 1.
      width: Width of each head, >= 1.
      scores: "gat", "gatv2", or "mean" for equal weights of all neighbours, without attention.
      dtype: Dtype of the computation; None for that of the parameters.

    Raises:
      ValueError: A size is below 1 or the name of the scores is unknown.
    """

    heads: int = 4
    width: int = 16
    scores: str = "gat"
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        """Checks the sizes and the name of the scores."""
        check_count("heads", self.heads, at_least=1)
        check_count("width", self.width, at_least=1)
        check_choice("scores", self.scores, SCORES)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, receivers: jax.Array, senders: jax.Array, edges: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The results and the weights of attention.

        Args:
          receivers: Features of those that listen, float [..., r, d].
          senders: Features of those that are heard, float [..., s, d].
          edges: Who hears whom, bool [..., r, s].

        Returns:
          Results [..., r, heads * width], and weights [..., heads, r, s], which sum to 1 over s.
        """
        project = self._projection("senders")
        heard = project(senders)
        if self.scores == "gat":
            at_receiver, at_sender = self._vectors("attention", 2)
            listening = project(receivers)
            scores = jax.vmap(gat_scores, (-3, -3, 0, 0), -3)(
                listening, heard, at_receiver, at_sender
            )
        elif self.scores == "gatv2":  # with a projection of its own for receivers
            listening = self._projection("receivers")(receivers)
            (attention,) = self._vectors("attention", 1)
            scores = jax.vmap(gatv2_scores, (-3, -3, 0), -3)(listening, heard, attention)
        else:
            scores = jnp.zeros((*edges.shape[:-2], self.heads, *edges.shape[-2:]))
        alpha = attention_weights(scores, edges[..., None, :, :])
        found = jnp.moveaxis(alpha.astype(heard.dtype) @ heard, -3, -2)
        return found.reshape(*found.shape[:-2], self.heads * self.width), alpha

    def _projection(self, name: str) -> Callable[[jax.Array], jax.Array]:
        """A linear map of features [..., k, d] to heads [..., heads, k, width]."""
        dense = nn.Dense(
            self.heads * self.width, use_bias=False, dtype=self.dtype,
            param_dtype=default_float(), kernel_init=orthogonal(1.0), name=name,
        )  # fmt: skip

        def project(x: jax.Array) -> jax.Array:
            z = dense(x)
            return jnp.moveaxis(z.reshape(*z.shape[:-1], self.heads, self.width), -2, -3)

        return project

    def _vectors(self, name: str, number: int) -> jax.Array:
        """Vectors a of all heads, [number, heads, width]."""
        shape = (number, self.heads, self.width)
        init = nn.initializers.glorot_uniform()
        vectors: jax.Array = self.param(name, init, shape, default_float())
        return vectors if self.dtype is None else vectors.astype(self.dtype)


class GraphCritic(nn.Module):
    r"""The graph-recurrent value network of GA-MATR: one value per agent, weights shared by all.

    .. math:: c_i = \mathrm{GRU}(\mathrm{MLP}(o_i)), \quad u = \mathrm{GAT}(c), \quad
              V_i = w^\top [c_i, u_i] + b

    Attributes:
      member: The layers in front of the graph: an MLP, with a GRU if it has a `gru_size`.
      attention: The layer between the agents.
      num_agents: Number n of agents.
      pooled: Whether all agents have the mean of their values, for a reward that they share.
    """

    member: Torso
    attention: GraphAttention
    num_agents: int
    pooled: bool = False

    @property
    def gru_size(self) -> int | None:
        """Size of the memory of all agents together; None without a GRU."""
        return None if self.member.gru_size is None else self.num_agents * self.member.gru_size

    @property
    def dtype(self) -> DTypeLike | None:
        """Dtype of the computation; None for that of the parameters."""
        return self.member.dtype

    def __call__(
        self, observation: Any, carry: Carry = (), is_first: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """The values [..., n] of joint observations, and the next carry."""
        values, carry, _ = self.attend(observation, carry, is_first)
        return values, carry

    @nn.compact
    def attend(
        self, observation: Any, carry: Carry = (), is_first: jax.Array | None = None
    ) -> tuple[jax.Array, Carry, jax.Array]:
        """The values [..., n], the next carry, and the weights of attention [..., heads, n, n].

        Args:
          observation: A dict with "agents", float [..., n, d], and "graph", bool [..., n, n].
          carry: Memory of all agents side by side, float [..., n * gru_size]; () without a GRU.
          is_first: Where episodes start in a sequence, bool [time, ...]; see `Torso`.
        """
        own, carry = self.member(
            observation["agents"],
            split_carry(carry, self.num_agents),
            for_all(is_first, self.num_agents),
        )
        heard, alpha = self.attention(own, own, observation["graph"])
        features = jnp.concatenate([own, ACTIVATIONS[self.member.activation](heard)], -1)
        head = nn.Dense(
            1, dtype=self.dtype, param_dtype=default_float(), kernel_init=orthogonal(1.0),
            dot_general=column_dot_general, name="head",
        )  # fmt: skip
        values = widened(head(features))[..., 0]
        if self.pooled:
            values = jnp.broadcast_to(jnp.mean(values, -1, keepdims=True), values.shape)
        return values, joined_carry(carry), alpha


def split_carry(carry: Carry, num_agents: int) -> Carry:
    """The carry with an axis of agents, [..., n, gru_size]; () stays."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], num_agents, -1), carry)


def for_all(is_first: jax.Array | None, num_agents: int) -> jax.Array | None:
    """Where episodes start, for every agent, [..., n]; None stays."""
    if is_first is None:
        return None
    return jnp.broadcast_to(is_first[..., None], (*is_first.shape, num_agents))


def joined_carry(carry: Carry) -> Carry:
    """The carry of all agents side by side, [..., n * gru_size]; () stays."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), carry)
