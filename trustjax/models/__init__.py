"""Flax linen modules: `model.apply(variables, images)` or `(variables, tokens)` gives logits."""

from trustjax.models._blocks import segment_positions as segment_positions
from trustjax.models._rotary import RopeScaling as RopeScaling
from trustjax.models._store import CheckpointError as CheckpointError
from trustjax.models.checkpoint import save_pretrained as save_pretrained
from trustjax.models.conv import ResNet as ResNet
from trustjax.models.encoder import Encoder as Encoder
from trustjax.models.encoder import mean_pool as mean_pool
from trustjax.models.generation import Generation as Generation
from trustjax.models.generation import generate as generate
from trustjax.models.gguf import GGUF as GGUF
from trustjax.models.gguf import convert_gguf as convert_gguf
from trustjax.models.gguf import read_gguf as read_gguf
from trustjax.models.mlp import MLP as MLP
from trustjax.models.pretrained import PretrainedViT as PretrainedViT
from trustjax.models.pretrained import build_vit as build_vit
from trustjax.models.pretrained import interpolate_positions as interpolate_positions
from trustjax.models.pretrained import pretrained_vit as pretrained_vit
from trustjax.models.text_checkpoint import PretrainedDecoder as PretrainedDecoder
from trustjax.models.text_checkpoint import PretrainedEncoder as PretrainedEncoder
from trustjax.models.text_checkpoint import pretrained_transformer as pretrained_transformer
from trustjax.models.text_checkpoint import save_transformer as save_transformer
from trustjax.models.transformer import Decoder as Decoder
from trustjax.models.transformer import KVCache as KVCache
from trustjax.models.vit import Preprocessing as Preprocessing
from trustjax.models.vit import ViT as ViT
