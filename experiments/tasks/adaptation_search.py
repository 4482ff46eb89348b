"""The search of the adaptation experiment under the address that earlier runs have saved."""

from dataclasses import dataclass, field

from experiments.tasks.adaptation import Adaptation
from experiments.tasks.search import Grid


@dataclass(kw_only=True)
class AdaptationSearch(Adaptation):
    """`Adaptation`, whose `grid` must be given."""

    grid: Grid = field()
