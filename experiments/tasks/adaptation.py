"""Cross-dataset adaptation of image classifiers: domains are one set of images under shifts.

The vision experiments of TRAM (arXiv:2310.03646, Section 4 and Table 3); see `transfer`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.runtime.memory import describe, memory_estimate
from experiments.tasks.adaptation_measures import Measures, domain_measures, validation_measures
from experiments.tasks.objectives import Batch, Images
from experiments.tasks.supervised import PRECISIONS, Training
from experiments.tasks.transfer import Transfer
from trustjax.data import ImageDataset, parse_shift, split, unit_range


@dataclass(kw_only=True)
class Adaptation(Transfer):
    """Configuration and stages of the experiment; conf/exp/tram_vision.yaml has the numbers.

    Without pre-training, fine-tuning may draw from the examples that pre-training would have had.

    Attributes:
      data: Makes the dataset; all domains are shifts of its images.
      model: Makes the network: `model(num_classes=..., dtype=...)`. It may be a pre-trained one.
      source: Shift of the source domain, such as "rotation:2"; None for the images as they are.
      target: Shift of the target domain; None for the images as they are.
      unseen: Shifts of the domains that no network is trained on.
    """

    data: Callable[[], ImageDataset]
    model: Callable[..., nn.Module]
    source: str | None
    target: str | None
    unseen: Sequence[str]

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        super().validate()
        for spec in (self.source, self.target, *self.unseen):
            if spec is not None:
                parse_shift(spec)

    def stages(self) -> list[Training]:
        """Pre-training, if it has steps, then one stage per method."""
        stages = super().stages()
        self._report_memory(stages)
        return stages

    # Data

    @functools.cached_property
    def _dataset(self) -> ImageDataset:
        return self.data()

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """Rows of the dataset by purpose; no example of fine-tuning is seen in pre-training.

        The split is the same for every seed, so that a search at another seed has not seen the test
        examples either.
        """
        fractions = {"pretrain": 0.45, "finetune": 0.2, "validation": 0.1, "test": 0.25}
        if not self.pretrain_steps:
            fractions = {"finetune": 0.65, "validation": 0.1, "test": 0.25}
        return split(self._dataset, fractions, seed=0)

    def _domain(self, spec: str | None, rows: np.ndarray, salt: int) -> ImageDataset:
        """The given rows of the dataset under a shift; `salt` draws its random parts anew."""
        images = self._dataset.images[rows]
        if spec is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), salt)
            shifted = jax.jit(parse_shift(spec))(unit_range(images), key)
            # A dataset holds images of eight bits.
            images = np.round(np.asarray(shifted) * 255).astype(np.uint8)
        return self._dataset._replace(images=images, labels=self._dataset.labels[rows])

    def _examples(self, part: str) -> tuple[ImageDataset, int]:
        rows = self._rows[part]
        spec = self.source if part == "pretrain" else self.target
        return self._domain(spec, rows, salt=0), len(rows)

    @functools.cached_property
    def _held_out(self) -> Batch:
        """The same examples in every domain; in a search, validation examples of the target."""
        if self.grid is None:
            rows = self._rows["test"][: self.max_test_examples]
            specs = [self.source, self.target, *self.unseen]
        else:
            rows, specs = self._rows["validation"], [self.target]
        domains = [self._domain(spec, rows, salt) for salt, spec in enumerate(specs, start=1)]
        return {
            "image": jnp.asarray(unit_range(np.stack([domain.images for domain in domains]))),
            "label": jnp.asarray(np.stack([domain.labels for domain in domains])),
        }

    # Networks

    @functools.cached_property
    def _objective(self) -> Images:
        data = self._dataset
        model = self.model(num_classes=data.num_classes, dtype=PRECISIONS[self.precision])
        example = jnp.zeros((1, *data.images.shape[1:]), jnp.float32)
        return Images(model, self.input_noise, example)

    def _report_memory(self, stages: Sequence[Training]) -> None:
        """Prints the memory that training a pre-trained network will take, as it may be large."""
        model = self._objective.model
        if not hasattr(model, "load_pretrained"):
            return
        examples = max(self.batch_size, self.sharpness_examples)
        images = jax.ShapeDtypeStruct((examples, *self._dataset.images.shape[1:]), jnp.float32)
        methods = [stage.method for stage in stages]
        num_networks = max(len(stage.lanes.seed_index) for stage in stages)
        print(describe(memory_estimate(model, methods, images, num_networks)))

    def _make_measures(self) -> Measures:
        if self.grid is not None:
            return validation_measures(self._objective, self.metric)
        return domain_measures(self._objective, self.metric, self.unseen, self.sharpness_examples)
