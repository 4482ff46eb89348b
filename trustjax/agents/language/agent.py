r"""A language policy that samples answers, has them scored, and learns from them.

One iteration ("update"):

    1. draw prompts, and n answers to each from pi_old, the policy as it is
    2. score the answers: rewards, levels, thinking
    3. compute the log-probabilities of the reference, and the advantages of whole groups
    4. num_epochs x num_minibatches steps on the loss of the objective
    5. measure how far the policy went from pi_old

All of it is one compiled program, which `jax.vmap` maps over seeds; only rewards of Python's leave
it for the host. At the first step of an iteration the policy is the old one, so that every ratio
is 1 and every KL to the old policy is 0; TRPA's trust region and PPO's clip act from the second
step on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trustjax.agents.algorithm import Metrics, PyTree, clipped
from trustjax.agents.language.answers import Answers, rows
from trustjax.agents.language.config import Config
from trustjax.agents.language.evaluation import Evaluation, evaluate
from trustjax.agents.language.measures import answer_metrics, policy_metrics
from trustjax.agents.language.sampling import draw
from trustjax.agents.language.scoring import answer_statistics
from trustjax.envs.language import Prompts
from trustjax.losses import (
    AnchorState,
    TokenStatistics,
    adapt_kl_coefficient,
    kl_estimate,
    masked_mean,
    trpa_trust_region,
)
from trustjax.models import Generation, generate, lora_init
from trustjax.models.lora import lora_tree
from trustjax.optim import two_pass_step
from trustjax.parallel import fully_sharded, replicated


class State(NamedTuple):
    """The whole state of training.

    Attributes:
      params: Parameters of the model.
      opt_state: State of the optimizer.
      reference: The reference policy; None if nothing reads it.
      kl_coefficient: Weight of the KL term, float32 [].
      key: Random key for everything that is drawn from here on.
      iteration: Number of iterations done so far, int32 [].
    """

    params: PyTree
    opt_state: optax.OptState
    reference: AnchorState | None
    kl_coefficient: jax.Array
    key: jax.Array
    iteration: jax.Array


class _Progress(NamedTuple):
    """What the steps of an iteration carry on.

    Attributes:
      params: Parameters of the model.
      opt_state: State of the optimizer.
      old_log_probs: log pi_old of all answers, as the first step has computed it.
      steps: Number of steps that were taken, int32 [].
      stopped: Whether the KL has ended the iteration, bool [].
    """

    params: PyTree
    opt_state: optax.OptState
    old_log_probs: jax.Array
    steps: jax.Array
    stopped: jax.Array


class LanguageAgent:
    """A language policy that learns from rewards of its own answers, as pure functions.

    Args:
      config: The configuration. It is validated; its numbers may be traced.

    Raises:
      ValueError: A field is out of range; it is named.
    """

    def __init__(self, config: Config) -> None:
        """Checks the configuration."""
        config.validate()
        self.config = config

    # Training.

    def init(self, key: jax.Array) -> State:
        """The state before the first iteration; `key` is that of the whole training."""
        config = self.config
        key_model, key = jax.random.split(key)
        params = config.initial_params
        if params is None and config.base_params is not None:
            params = lora_tree(lora_init(key_model, config.base_params, rank=config.lora_rank))
        elif params is None:
            params = config.model.init(key_model, config.prompts.tokens[:1])["params"]
        params = jax.tree.map(jnp.asarray, params)
        state = State(
            params=params,
            opt_state=self._optimizer().init(params),
            reference=config.reference.init(params) if config.needs_reference else None,
            kl_coefficient=jnp.asarray(config.kl_coefficient, jnp.float32),
            key=key,
            iteration=jnp.zeros([], jnp.int32),
        )
        return self._placed(state)

    def update(self, state: State) -> tuple[State, Metrics]:
        """The state after one iteration, and its metrics, which are scalars."""
        config = self.config
        key, key_draw, key_learn = jax.random.split(state.key, 3)
        drawn = draw(config, state.params, key_draw)
        answers = self._prepared(state, drawn.answers)
        progress, first = self._learn(state, answers, key_learn)
        answers = answers._replace(old_log_probs=progress.old_log_probs)
        new = self.statistics(progress.params, answers)
        metrics = {
            **answer_metrics(answers),
            **policy_metrics(config, answers, new),
            **config.objective.metrics(answers),
            "loss": first["loss"],
            "loss/after": self._value(new, answers, state.kl_coefficient),
            "entropy": first["entropy"],
            "gradient_steps": progress.steps,
            "sampling/rounds": drawn.rounds,
            "sampling/informative": drawn.informative,
            "sampling/tokens": drawn.tokens,
        }
        coefficient, reference = state.kl_coefficient, state.reference
        if config.kl_to is not None:
            metrics["kl_coefficient"] = coefficient
        if config.kl_to is not None and config.kl_target is not None:
            name = "kl/reference" if config.kl_to == "reference" else "trust/distance"
            coefficient = adapt_kl_coefficient(coefficient, metrics[name], config.kl_target)
        if reference is not None:
            distance = metrics["kl/reference"]
            reference = config.reference.update(reference, progress.params, distance=distance)
        state = State(
            progress.params, progress.opt_state, reference, coefficient, key, state.iteration + 1
        )
        return self._placed(state), metrics

    def train(self, key: jax.Array) -> tuple[State, Metrics]:
        """The last state of a whole training, and the metrics of each iteration."""
        return self.advance(self.init(key), self.config.num_updates)

    def advance(self, state: State, num_updates: int) -> tuple[State, Metrics]:
        """The state after `num_updates` iterations in one scan, and the metrics of each."""
        return jax.lax.scan(lambda state, _: self.update(state), state, length=num_updates)

    # Acting.

    def act(
        self,
        state: State,
        observation: Prompts,
        key: jax.Array,
        carry: tuple[()] = (),
        *,
        deterministic: bool = False,
    ) -> tuple[Generation, tuple[()]]:
        """One answer to each prompt; without randomness, the likeliest token every time."""
        config = self.config
        answers = generate(
            config.model, config.whole_params(state.params), observation.tokens, key,
            prompt_mask=observation.mask, max_new_tokens=config.max_new_tokens,
            temperature=0.0 if deterministic else config.temperature,
            stop_tokens=config.stop_tokens, pad_token=config.pad_token,
        )  # fmt: skip
        return answers, carry

    def evaluate(
        self,
        state: State,
        key: jax.Array,
        prompts: Prompts,
        *,
        num_samples: int = 1,
        deterministic: bool = False,
    ) -> Evaluation:
        """Answers to all of these prompts, scored; see `Evaluation`."""
        return evaluate(
            self.config, state.params, key, prompts,
            num_samples=num_samples, deterministic=deterministic,
        )  # fmt: skip

    # Pieces of an iteration.

    def statistics(self, params: PyTree, answers: Answers) -> TokenStatistics:
        """Log-probabilities and entropies of the answers' tokens, [prompts, n, time]."""
        config, shape = self.config, answers.tokens.shape
        found = answer_statistics(
            config.model, config.whole_params(params),
            jnp.repeat(answers.prompts.tokens, shape[1], 0),
            jnp.repeat(answers.prompts.mask, shape[1], 0),
            rows(answers.tokens), rows(answers.mask),
            temperature=config.temperature, chunk=config.chunk,
        )  # fmt: skip
        return TokenStatistics(*(x.reshape(*shape, *x.shape[2:]) for x in found))

    def _optimizer(self) -> optax.GradientTransformation:
        return self.config.optimizer(self.config.learning_rate)

    def _placed(self, state: State) -> State:
        """The state on the devices of the mesh."""
        mesh = self.config.mesh
        if mesh is None:
            return state
        where = fully_sharded(state, mesh) if self.config.shard_params else replicated(mesh)
        placed: State = jax.lax.with_sharding_constraint(state, where)
        return placed

    def _recomputes(self) -> bool:
        """Whether the first step finds out the old policy's log-probabilities on its way."""
        return self.config.old_policy == "recomputed" and self.config.num_minibatches == 1

    def _prepared(self, state: State, answers: Answers) -> Answers:
        """The answers with all that stays as it is during the steps."""
        config = self.config
        answers = answers._replace(progress=state.iteration / config.num_updates)
        if state.reference is not None:
            reference = self.statistics(state.reference.params, answers).log_probs
            answers = answers._replace(reference_log_probs=reference)
        if config.old_policy == "recomputed" and not self._recomputes():
            old = self.statistics(state.params, answers).log_probs
            answers = answers._replace(old_log_probs=old)
        advantages = jax.lax.stop_gradient(config.objective.advantages(answers))
        return answers._replace(advantages=advantages)

    def _learn(self, state: State, answers: Answers, key: jax.Array) -> tuple[_Progress, Metrics]:
        """The steps of an iteration, and the metrics of the first one."""
        config = self.config
        number = config.num_minibatches
        step = two_pass_step(
            self._loss,
            self._optimizer(),
            map_grads=lambda grads: clipped(grads, config.max_grad_norm),
        )

        def minibatch(progress: _Progress, groups: jax.Array) -> tuple[_Progress, Metrics]:
            part = answers._replace(old_log_probs=progress.old_log_probs)
            part = part if number == 1 else config.shared_out(part.select(groups))
            is_first = (progress.steps == 0) & self._recomputes()
            params, opt_state, loss, aux = step(
                progress.params, progress.opt_state, part, is_first, state.kl_coefficient
            )
            old = aux["old_log_probs"] if self._recomputes() else progress.old_log_probs
            after = _Progress(params, opt_state, old, progress.steps + 1, progress.stopped)
            if config.max_kl is not None:
                after = self._unless_stopped(progress, after, aux["kl"])
            return after, {"loss": loss, "entropy": aux["entropy"]}

        start = _Progress(
            state.params, state.opt_state, answers.old_log_probs, jnp.int32(0), jnp.zeros([], bool)
        )
        keys = jax.random.split(key, config.num_epochs)
        orders = jax.vmap(lambda key: jax.random.permutation(key, config.num_prompts))(keys)
        orders = orders.reshape(config.num_epochs * number, config.num_prompts // number)
        progress, history = jax.lax.scan(minibatch, start, orders)
        return progress, {name: values[0] for name, values in history.items()}

    def _unless_stopped(self, before: _Progress, after: _Progress, kl: jax.Array) -> _Progress:
        """`after` the step, or `before` it from where `max_kl` is exceeded."""
        stopped = before.stopped | (kl > jnp.asarray(self.config.max_kl, kl.dtype))
        kept: _Progress = jax.tree.map(lambda b, a: jnp.where(stopped, b, a), before, after)
        return kept._replace(stopped=stopped)

    def _loss(
        self, params: PyTree, answers: Answers, is_first: jax.Array, kl_coefficient: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The loss of whole groups, [], and what the iteration wants to know of the policy."""
        found = self.statistics(params, answers)
        # At the first step the policy is the old one: its ratios are then exactly 1.
        now = jax.lax.stop_gradient(found.log_probs)
        old = jnp.where(is_first, now, answers.old_log_probs)
        answers = answers._replace(old_log_probs=old)
        mask = rows(answers.mask)
        loss = self._value(found, answers, kl_coefficient)
        kl = masked_mean(kl_estimate(rows(old), rows(now)), mask)
        entropy = masked_mean(rows(found.entropy), mask)
        return loss, {"old_log_probs": old, "entropy": entropy, "kl": kl}

    def _value(
        self, found: TokenStatistics, answers: Answers, kl_coefficient: jax.Array
    ) -> jax.Array:
        """The loss [] from the statistics of the answers' tokens."""
        config = self.config
        mask, log_probs = rows(answers.mask), rows(found.log_probs)
        loss = config.objective.loss(found.log_probs, answers)
        if config.kl_to == "old":
            old = rows(answers.old_log_probs)
            loss += kl_coefficient * trpa_trust_region(log_probs, old, mask, max_kl=None)
        if config.kl_to == "reference":
            estimates = kl_estimate(log_probs, rows(answers.reference_log_probs))
            loss += kl_coefficient * masked_mean(estimates, mask)
        entropy = masked_mean(rows(found.entropy), mask)
        return loss - jnp.asarray(config.entropy_coefficient, entropy.dtype) * entropy
