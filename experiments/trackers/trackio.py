"""trackio."""

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
    """A run of trackio in the folder TRACKIO_DIR, else in `folder/trackio`; metrics `stage/metric`.

    Values are means over seeds at the steps of the stage. A resumed run is logged anew with all
    rows from the first one on, and the run of the earlier start is deleted where it is on this
    machine. trackio writes twice a second in a thread of its own: the rows of the last moments
    before a kill can be missing until the run is resumed.

    `project` is "trustjax" unless given.
    """

    def __init__(self, folder: Path, *, project: str = "trustjax") -> None:
        self._folder = folder
        self._project = project
        self._trackio: ModuleType | None = None

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Begins a run of trackio, logs `rows`, deletes the runs of earlier starts."""
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
    """trackio reads TRACKIO_DIR when it is imported, and the runs of a sweep have other folders."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]
    with environment_default("TRACKIO_DIR", home):
        return importlib.import_module("trackio")
