"""The tracker that writes to MLflow."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.runtime.config import flat
from experiments.trackers.rows import Row, seed_means
from experiments.trackers.services import Starts, quiet, read_config, require

require("mlflow", "sqlalchemy", "alembic")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reports every use to its makers
with quiet():
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
logging.getLogger("mlflow").setLevel(logging.ERROR)

_MOST_METRICS, _MOST_PARAMS = 1000, 100  # the most that MLflow takes in one request


class Mlflow:
    """A run of MLflow in the store MLFLOW_TRACKING_URI, or else in `folder/mlflow/mlflow.db`.

    Metrics are called `stage/metric` and are means over seeds, at the steps of the stage. The
    configuration becomes parameters such as `task.seed`. A resumed run is logged again from its
    first row, and MLflow's run of the earlier start goes to the trash. MLflow has no infinity: it
    stores the largest number instead.

    The MLflow experiment is `experiment`, by default the name of the experiment in conf/exp.
    """

    def __init__(self, folder: Path, *, experiment: str | None = None) -> None:
        self._folder = folder
        self._experiment = experiment
        self._run_id = ""

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Begins a run of MLflow, logs the configuration and `rows`, and deletes earlier runs."""
        home = self._folder.absolute() / "mlflow"
        home.mkdir(exist_ok=True)
        store = os.environ.get("MLFLOW_TRACKING_URI")
        config = read_config(self._folder)
        starts = Starts(home)
        with _asking():
            self._client = MlflowClient(store or f"sqlite:///{home / 'mlflow.db'}")
            name = self._experiment or config["exp"]
            found = self._client.get_experiment_by_name(name)
            artifacts = None if store else (home / "artifacts").as_uri()
            experiment = (
                found.experiment_id if found else self._client.create_experiment(name, artifacts)
            )
            run = self._client.create_run(experiment, run_name=starts.name(self._folder))
            self._run_id = run.info.run_id
            starts.add(self._run_id)
            params = [Param(key, str(value)) for key, value in flat(config).items()]
            for first in range(0, len(params), _MOST_PARAMS):
                self._client.log_batch(self._run_id, params=params[first : first + _MOST_PARAMS])
        self.log(rows)
        for earlier in starts.earlier:
            with contextlib.suppress(ConnectionError), _asking():  # deleted already
                self._client.delete_run(earlier)

    def log(self, rows: Sequence[Row]) -> None:
        """Writes the means over seeds."""
        now = int(1000 * time.time())
        metrics = [
            Metric(key, mean, now, point.step)
            for point in seed_means(rows)
            for key, mean in point.prefixed().items()
        ]
        with _asking():
            for first in range(0, len(metrics), _MOST_METRICS):
                self._client.log_batch(self._run_id, metrics[first : first + _MOST_METRICS])

    def close(self) -> None:
        """Marks the run as finished."""
        if self._run_id:
            with _asking():
                self._client.set_terminated(self._run_id)


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    try:
        with quiet():
            yield
    except MlflowException as error:
        raise ConnectionError(f"MLflow: {error}") from error
