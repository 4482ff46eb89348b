"""Flax linen classifiers: `model.apply(variables, images)` gives logits, nothing else is asked."""

from trustjax.models.conv import ResNet as ResNet
from trustjax.models.mlp import MLP as MLP
from trustjax.models.vit import ViT as ViT
