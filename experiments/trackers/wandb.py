"""The tracker that writes to Weights & Biases."""

import os
from collections.abc import Sequence
from pathlib import Path

from experiments.trackers.rows import Row, seed_means
from experiments.trackers.services import (
    Starts,
    environment_default,
    quiet,
    read_config,
    require,
)

require("wandb")
with quiet():
    import wandb


class Wandb:
    """A run of Weights & Biases with its files in `folder/wandb`.

    Metrics are called `stage/metric` and are means over seeds; the x axis is the `step` of the
    stage. The environment decides whether the run is online, offline or disabled (WANDB_MODE,
    `wandb login`). Every start of a run is a run of W&B with all rows from the first: of FOLDER,
    FOLDER-2, ... the last one is complete. The runs of one experiment are a group. W&B writes in
    another process: after a kill the last rows may be missing until the run is resumed.

    `project` is by default WANDB_PROJECT or else "trustjax".
    """

    def __init__(self, folder: Path, *, project: str | None = None) -> None:
        self._folder = folder
        self._project = project or os.environ.get("WANDB_PROJECT", "trustjax")
        self._run: wandb.Run | None = None

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Begins a run of W&B and logs `rows`."""
        config = read_config(self._folder)
        starts = Starts(self._folder / "wandb")
        cache = self._folder.absolute() / "wandb" / "cache"  # for the logs of its process
        try:
            with quiet(), environment_default("WANDB_CACHE_DIR", cache):
                self._run = wandb.init(
                    project=self._project,
                    group=config["exp"],
                    name=starts.name(self._folder),
                    dir=self._folder,
                    config=config,
                    settings=wandb.Settings(silent=True, console="off"),
                )
        except wandb.Error as error:
            wandb.teardown()  # it would go on with the settings that failed
            raise ConnectionError(f"Weights & Biases: {error}") from error
        starts.add(self._run.id)
        self._run.define_metric("*", step_metric="step")
        url = None if self._run.offline else self._run.url
        if url:
            print(f"Weights & Biases: {url}")
        self.log(rows)

    def log(self, rows: Sequence[Row]) -> None:
        """Hands the means over seeds to W&B's process."""
        assert self._run is not None, "resume_from comes first"
        for point in seed_means(rows):
            self._run.log({"step": point.step, **point.prefixed()})

    def close(self) -> None:
        """Waits until W&B has all rows, and ends its process."""
        if self._run is not None:
            self._run.finish()
            wandb.teardown()  # the next run of a sweep starts one that writes to its own folder
