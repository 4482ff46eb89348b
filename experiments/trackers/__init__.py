"""Trackers, which record the rows of metrics: metrics.csv, TensorBoard, and online services.

`wandb`, `mlflow` and `trackio` are modules of their own, which need packages of the extra
`trackers`. This package does not import them.
"""

from experiments.trackers.csv import Csv as Csv
from experiments.trackers.csv import RowsDigest as RowsDigest
from experiments.trackers.csv import read_rows as read_rows
from experiments.trackers.rows import Row as Row
from experiments.trackers.rows import Tracker as Tracker
from experiments.trackers.tensorboard import TensorBoard as TensorBoard
