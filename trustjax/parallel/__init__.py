"""Training on several devices: a mesh shares the batch, and every device has all parameters."""

from trustjax.parallel.data_parallel import check_batch_size as check_batch_size
from trustjax.parallel.data_parallel import data_parallel_step as data_parallel_step
from trustjax.parallel.data_parallel import shard_batch as shard_batch
from trustjax.parallel.mesh import batch_sharding as batch_sharding
from trustjax.parallel.mesh import fully_sharded as fully_sharded
from trustjax.parallel.mesh import make_mesh as make_mesh
from trustjax.parallel.mesh import replicated as replicated
