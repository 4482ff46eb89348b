"""Checkpoints of one stage, through Orbax: whole or absent, whenever the process ends."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from experiments.loop import Mark, SaveError


class Checkpoints:
    """The checkpoints of one stage, `folder/<step>`; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # A failed save is reported where it happens, and rows logged after it are not lost.
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # a step that was being deleted lacks its metadata
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise SaveError(f"cannot write to {self.folder}: {error}") from error

    def latest(self) -> Mark:
        """The mark of the newest checkpoint, `Mark()` where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return Mark()
        arguments = ocp.args.Composite(mark=ocp.args.JsonRestore())
        return Mark(**self._manager.restore(step, args=arguments)["mark"])

    def save(self, state: Any, mark: Mark) -> None:
        """Writes a checkpoint at `mark.step`, then deletes those that are too many.

        Raises SaveError, which names the folder and the newest checkpoint that is whole.
        """
        whole = self._manager.latest_step()
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            mark=ocp.args.JsonSave({**mark._asdict(), "began_from": dict(mark.began_from)}),
        )
        try:
            if not self._manager.save(mark.step, args=arguments):
                raise RuntimeError("declined by Orbax")
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            kept = "there is no earlier one" if whole is None else f"step {whole} is whole"
            raise SaveError(
                f"cannot save step {mark.step} in {self.folder} ({kept}): {reason}"
            ) from error

    def restore(self, like: Any) -> Any:
        """The state of the newest checkpoint, with the structure and placement of `like`."""
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._manager.restore(self._manager.latest_step(), args=arguments)["state"]

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()
