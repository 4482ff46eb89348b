"""Optax gradient transformations. Each does one thing; chain them with any Optax optimizer."""

from trustjax.optim.alternating import AlternatingState as AlternatingState
from trustjax.optim.alternating import alternating as alternating
from trustjax.optim.alternating import clean_params as clean_params
from trustjax.optim.auon import AuONState as AuONState
from trustjax.optim.auon import auon as auon
from trustjax.optim.auon import hybrid_auon as hybrid_auon
from trustjax.optim.auon import matrix_labels as matrix_labels
from trustjax.optim.auon import scale_by_auon as scale_by_auon
from trustjax.optim.esam import ESAMState as ESAMState
from trustjax.optim.esam import esam as esam
from trustjax.optim.fisher import FisherState as FisherState
from trustjax.optim.fisher import fisher_sam as fisher_sam
from trustjax.optim.fisher import tram_fisher as tram_fisher
from trustjax.optim.gsam import GSAMState as GSAMState
from trustjax.optim.gsam import gsam as gsam
from trustjax.optim.gsam import radius_schedule as radius_schedule
from trustjax.optim.mirror import MirrorState as MirrorState
from trustjax.optim.mirror import mirror_descent as mirror_descent
from trustjax.optim.sam import SAMState as SAMState
from trustjax.optim.sam import asam as asam
from trustjax.optim.sam import sam as sam
from trustjax.optim.tram import TRAMState as TRAMState
from trustjax.optim.tram import tram as tram
from trustjax.optim.two_pass import StepResult as StepResult
from trustjax.optim.two_pass import two_pass_step as two_pass_step
