"""The search of training from scratch under the address that earlier runs have saved."""

from dataclasses import dataclass, field

from experiments.tasks.from_scratch import FromScratch
from experiments.tasks.search import Grid


@dataclass(kw_only=True)
class FromScratchSearch(FromScratch):
    """`FromScratch`, whose `grid` and `validation_examples` must be given."""

    grid: Grid = field()
    validation_examples: int = field()
