"""Optax transforms and losses whose updates stay inside a trust region."""

from trustjax import geometry as geometry
from trustjax import losses as losses
from trustjax import optim as optim

__version__ = "0.1.0"
