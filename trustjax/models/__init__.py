"""Flax linen classifiers: `model.apply(variables, images)` returns logits."""

from trustjax.models._config import CheckpointError as CheckpointError
from trustjax.models.checkpoint import save_pretrained as save_pretrained
from trustjax.models.conv import ResNet as ResNet
from trustjax.models.mlp import MLP as MLP
from trustjax.models.pretrained import PretrainedViT as PretrainedViT
from trustjax.models.pretrained import build_vit as build_vit
from trustjax.models.pretrained import interpolate_positions as interpolate_positions
from trustjax.models.pretrained import pretrained_vit as pretrained_vit
from trustjax.models.vit import Preprocessing as Preprocessing
from trustjax.models.vit import ViT as ViT
