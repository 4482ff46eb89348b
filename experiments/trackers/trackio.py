"""The tracker that writes to trackio."""

import contextlib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from experiments.trackers.rows import Row, seed_means
from experiments.trackers.services import (
    Starts,
    environment_default,
    quiet,
    read_config,
    require,
)

require("trackio")


class Trackio:
    """A run of trackio in the folder TRACKIO_DIR, or else in `folder/trackio`.

    Metrics are called `stage/metric` and are means over seeds, at the steps of the stage. A resumed
    run is logged again from its first row, and trackio's run of the earlier start is deleted if it
    is on this machine. trackio writes twice a second in a thread: after a kill the last rows may be
    missing until the run is resumed.
    """

    def __init__(self, folder: Path, *, project: str = "trustjax") -> None:
        self._folder = folder
        self._project = project
        self._trackio: ModuleType | None = None

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Begins a run of trackio, logs `rows`, and deletes the runs of earlier starts."""
        config = read_config(self._folder)
        home = self._folder.absolute() / "trackio"
        starts = Starts(home)
        with quiet():
            self._trackio = _import_trackio(home)
            self._run = self._trackio.init(
                project=self._project,
                name=starts.name(self._folder),
                group=config["exp"],
                config=config,
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
            starts.add(self._run.id)
            self.log(rows)
            with contextlib.suppress(ValueError):  # nothing is there yet, or it is elsewhere
                for run in self._trackio.Api().runs(self._project):
                    if run.id in starts.earlier:
                        run.delete()

    def log(self, rows: Sequence[Row]) -> None:
        """Hands the means over seeds to trackio's thread."""
        for point in seed_means(rows):
            self._run.log(point.prefixed(), step=point.step)

    def close(self) -> None:
        """Waits until everything is written."""
        if self._trackio is not None:
            with quiet():
                self._trackio.finish()


def _import_trackio(home: Path) -> ModuleType:
    """Imports trackio for the folder `home`.

    It reads TRACKIO_DIR when it is imported, so the next run of a sweep must import it again.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]
    with environment_default("TRACKIO_DIR", home):
        return importlib.import_module("trackio")
