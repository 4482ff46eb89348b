"""Losses as pure functions over leading batch axes: one value per example, the caller reduces."""

from trustjax.losses.regularizer import bregman_penalty as bregman_penalty
from trustjax.losses.regularizer import mesa_penalty as mesa_penalty
from trustjax.losses.regularizer import r3f_penalty as r3f_penalty
from trustjax.losses.regularizer import smart_penalty as smart_penalty
from trustjax.losses.regularizer import smart_perturbation as smart_perturbation
from trustjax.losses.regularizer import trpo_penalty as trpo_penalty
