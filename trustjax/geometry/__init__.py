"""The rulers: divergences, norms and measures of a loss surface. Pure functions, no state."""

from trustjax.geometry.divergence import gaussian_kl as gaussian_kl
from trustjax.geometry.divergence import gaussian_renyi as gaussian_renyi
from trustjax.geometry.divergence import jensen_shannon as jensen_shannon
from trustjax.geometry.divergence import kl_divergence as kl_divergence
from trustjax.geometry.divergence import l2_distance as l2_distance
from trustjax.geometry.divergence import mmd as mmd
from trustjax.geometry.divergence import renyi_divergence as renyi_divergence
from trustjax.geometry.divergence import reverse_kl as reverse_kl
from trustjax.geometry.divergence import symmetric_kl as symmetric_kl
from trustjax.geometry.divergence import tsallis_divergence as tsallis_divergence
from trustjax.geometry.matrix import MUON_COEFFICIENTS as MUON_COEFFICIENTS
from trustjax.geometry.matrix import frobenius_normalize as frobenius_normalize
from trustjax.geometry.matrix import newton_schulz as newton_schulz
from trustjax.geometry.mirror_map import MirrorMap as MirrorMap
from trustjax.geometry.mirror_map import bregman_divergence as bregman_divergence
from trustjax.geometry.mirror_map import euclidean as euclidean
from trustjax.geometry.mirror_map import hypentropy as hypentropy
from trustjax.geometry.mirror_map import negative_entropy as negative_entropy
from trustjax.geometry.mirror_map import p_norm as p_norm
from trustjax.geometry.mirror_map import separable_p as separable_p
from trustjax.geometry.mirror_map import simplex as simplex
from trustjax.geometry.mirror_map import spectral_hypentropy as spectral_hypentropy
from trustjax.geometry.norm import global_norm as global_norm
from trustjax.geometry.sharpness import epsilon_sharpness as epsilon_sharpness
from trustjax.geometry.similarity import linear_cka as linear_cka
