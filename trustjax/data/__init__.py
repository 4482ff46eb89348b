"""Image datasets, their batches, and the distribution shifts they are tested under."""

from trustjax.data.batches import Batches as Batches
from trustjax.data.batches import evaluation_batches as evaluation_batches
from trustjax.data.batches import iterate as iterate
from trustjax.data.images import DataError as DataError
from trustjax.data.images import ImageDataset as ImageDataset
from trustjax.data.images import digits as digits
from trustjax.data.images import hugging_face as hugging_face
from trustjax.data.images import split as split
from trustjax.data.images import unit_range as unit_range
from trustjax.data.shifts import SHIFTS as SHIFTS
from trustjax.data.shifts import parse_shift as parse_shift
