"""The configuration of a language policy that learns from rewards of its own answers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_choice, check_count, check_number
from trustjax.agents.algorithm import MakeOptimizer, PyTree, static
from trustjax.agents.language.objectives import Objective, PolicyGradient
from trustjax.envs.language import Prompts, RewardFn
from trustjax.losses import Anchor, fixed_anchor
from trustjax.models import Decoder, lora_merge
from trustjax.models.lora import lora_factors
from trustjax.parallel import batch_sharding

Adam = optax.adam  # the default; a plain name, so that configurations can show it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A Config is a pytree: numbers are leaves, which `jax.vmap` may sweep; the rest is static.

    Attributes:
      model: The language model; static.
      prompts: The prompts to train on, with what the reward knows of them.
      reward: Function `reward(facts, tokens, mask) -> Rewards` of answers; see
        `trustjax.envs.language`. Static.
      initial_params: Trained parameters to begin with, such as those of a fine-tuned model; None
        for random ones.
      base_params: Frozen parameters of the model, beside which the factors of LoRA are all that is
        trained; None trains the parameters themselves.
      lora_rank: Rank of these factors, >= 1; static.
      lora_alpha: Scale of their change, as in `lora_merge`, > 0.
      objective: What the policy learns from its groups; see `objectives`. Static.
      num_updates: Number of iterations of the whole training, >= 1; static.
      num_prompts: Prompts of one iteration, >= 1; static.
      num_samples: Answers n to each of them, its group, >= 1, and >= 2 where the objective compares
        them; static.
      max_new_tokens: Largest number of tokens of an answer, >= 1; static.
      stop_tokens: Tokens that end an answer; static.
      pad_token: Token of padding; static.
      temperature: Temperature at which answers are drawn and the policy is trained, > 0.
      sampling_rounds: Dynamic sampling: how often prompts are drawn anew in place of those whose
        answers all have the same reward, 1 for never. Prompts without a difference that are left
        after the last round stay in the batch. Static.
      num_epochs: Passes over the answers of an iteration, >= 1; static.
      num_minibatches: Steps of a pass, >= 1, a divisor of `num_prompts`; each has whole groups.
        Static.
      old_policy: Log-probabilities of the old policy: "recomputed" by the training pass, or those
        of the "sampler". They differ by rounding, which `rollout/difference` reports. Static.
      reference: How the reference policy moves, an anchor of `trustjax.losses`: `fixed_anchor()`
        never, `periodic_anchor(k)` every k iterations. Static.
      kl_to: Policy to which a KL term holds the policy, the "reference" or the "old" one; None for
        no such term beside what the loss has. Static.
      kl_coefficient: Weight of this term, >= 0; the first one if it is adapted.
      kl_target: KL per token that the weight is adapted to, as in `adapt_kl_coefficient`, > 0; None
        for a fixed weight.
      max_kl: KL per token to the old policy, > 0, from which on the steps of an iteration change
        nothing more; None for no end.
      entropy_coefficient: Weight of the mean entropy in nats, which the policy maximises too, >= 0.
      optimizer: Factory `learning_rate -> optax.GradientTransformation`; static.
      learning_rate: Learning rate, > 0.
      max_grad_norm: Global norm to which gradients are clipped, > 0; None for no clipping.
      chunk: Entries of the vocabulary whose logits are computed at a time, >= 1; static.
      mesh: Devices that share the groups of an iteration, of `trustjax.parallel.make_mesh`; None
        for one device. Static.
      shard_params: Whether each device holds a part of the trained parameters, of the optimizer's
        state and of the reference, as `trustjax.parallel.fully_sharded` places them. Otherwise each
        holds all of them. Static.
    """

    model: Decoder = static(None)
    prompts: Prompts = None  # type: ignore[assignment]  # checked in `validate`
    reward: RewardFn = static(None)
    initial_params: PyTree = None
    base_params: PyTree = None
    lora_rank: int = static(8)
    lora_alpha: ArrayLike = 16.0
    objective: Objective = static(PolicyGradient())
    num_updates: int = static(100)
    num_prompts: int = static(16)
    num_samples: int = static(8)
    max_new_tokens: int = static(128)
    stop_tokens: tuple[int, ...] = static((0,))
    pad_token: int = static(0)
    temperature: ArrayLike = 1.0
    sampling_rounds: int = static(1)
    num_epochs: int = static(2)
    num_minibatches: int = static(1)
    old_policy: Literal["recomputed", "sampler"] = static("recomputed")
    reference: Anchor = static(fixed_anchor())
    kl_to: Literal["reference", "old"] | None = static(None)
    kl_coefficient: ArrayLike = 0.001
    kl_target: ArrayLike | None = None
    max_kl: ArrayLike | None = None
    entropy_coefficient: ArrayLike = 0.0
    optimizer: MakeOptimizer = static(Adam)
    learning_rate: ArrayLike = 1e-4
    max_grad_norm: ArrayLike | None = 1.0
    chunk: int = static(4096)
    mesh: Mesh | None = static(None)
    shard_params: bool = static(False)

    def __post_init__(self) -> None:
        """Turns lists, which configuration files have in place of tuples, into tuples."""
        if isinstance(self.stop_tokens, Sequence | np.ndarray):
            object.__setattr__(self, "stop_tokens", tuple(int(x) for x in self.stop_tokens))

    @property
    def needs_reference(self) -> bool:
        """Whether anything reads the reference policy, which is left out of the state otherwise."""
        return self.objective.needs_reference or self.kl_to == "reference"

    def whole_params(self, trained: PyTree) -> PyTree:
        """The parameters of the model from those that are trained."""
        if self.base_params is None:
            return trained
        return lora_merge(self.base_params, lora_factors(trained), alpha=self.lora_alpha)

    def shared_out(self, groups: PyTree) -> PyTree:
        """Arrays with a first axis of groups, split over the devices of the mesh; numbers as is."""
        if self.mesh is None:
            return groups
        split = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: x if jnp.ndim(x) == 0 else jax.lax.with_sharding_constraint(x, split), groups
        )

    def agent(self) -> Any:
        """The `LanguageAgent` with this configuration."""
        from trustjax.agents.language.agent import LanguageAgent

        return LanguageAgent(self)

    def validate(self) -> None:
        """Raises ValueError, which names the field, for a Config that cannot work."""
        kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
            "model": (lambda x: isinstance(x, Decoder), "be a Decoder"),
            "prompts": (lambda x: isinstance(x, Prompts), "be Prompts"),
            "reward": (callable, "be a function of facts, tokens and mask"),
            "optimizer": (callable, "be a function of the learning rate"),
        }
        for name, (fits, requirement) in kinds.items():
            if not fits(getattr(self, name)):
                raise FieldError(name, requirement, type(getattr(self, name)).__name__)
        self.prompts.check()
        for name in (
            "num_updates", "num_prompts", "num_samples", "max_new_tokens", "sampling_rounds",
            "num_epochs", "num_minibatches", "chunk", "lora_rank",
        ):  # fmt: skip
            check_count(name, getattr(self, name), at_least=1)
        fewest = getattr(self.objective, "smallest_group", 1)
        if self.num_samples < fewest:
            must = f"be >= {fewest}, as the objective compares the answers to a prompt"
            raise FieldError("num_samples", must, self.num_samples)
        for name in (
            "temperature", "kl_target", "max_kl", "learning_rate", "max_grad_norm", "lora_alpha",
        ):  # fmt: skip
            check_number(name, getattr(self, name), above=0.0)
        for name in ("kl_coefficient", "entropy_coefficient"):
            check_number(name, getattr(self, name), at_least=0.0)
        check_choice("old_policy", self.old_policy, ("recomputed", "sampler"))
        if self.kl_to is not None:
            check_choice("kl_to", self.kl_to, ("reference", "old"))
        elif self.kl_target is not None:
            raise FieldError("kl_to", "name a policy where there is a kl_target", None)
        if self.num_prompts % self.num_minibatches:
            raise FieldError(
                "num_minibatches", f"divide the {self.num_prompts} prompts", self.num_minibatches
            )
        if self.shard_params and self.mesh is None:
            raise FieldError("mesh", "be given where shard_params is True", None)
        if self.mesh is not None and self.num_prompts // self.num_minibatches % self.mesh.size:
            must = f"be a multiple of {self.num_minibatches * self.mesh.size}, which the "
            must += f"{self.num_minibatches} minibatches on {self.mesh.size} devices share"
            raise FieldError("num_prompts", must, self.num_prompts)
        self._check_tokens()

    def _check_tokens(self) -> None:
        limit = self.model.vocab_size
        tokens = self.prompts.tokens
        if not isinstance(tokens, jax.core.Tracer):
            given = np.asarray(tokens)  # NumPy's functions would trace a JAX array
            lowest, highest = given.min(), given.max()
            if lowest < 0 or highest >= limit:
                wrong = lowest if lowest < 0 else highest
                raise FieldError("prompts.tokens", f"be in [0, {limit}), the vocabulary", wrong)
        for name, each in (("stop_tokens", self.stop_tokens), ("pad_token", (self.pad_token,))):
            for token in each:
                if not 0 <= token < limit:
                    raise FieldError(name, f"be in [0, {limit}), the vocabulary", token)
