"""Checkpoints of one stage, through Orbax: whole or absent, and known to be what was written."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from experiments.runtime.digests import file_digest, sealed, unsealed
from experiments.runtime.files import SaveError

DIGESTS = "digests.txt"  # JSON and a last line with its own digest


class CheckpointMetadata(NamedTuple):
    """What a checkpoint holds beside the state, as JSON.

    Attributes:
      step: Number of steps of the stage that are done.
      num_rows: Number of rows that metrics.csv had. A resumed run truncates the file to them.
      seconds: Seconds spent on the stage.
      finished: Whether the rows of the final evaluation are among the `num_rows`.
      began_from: Length of each earlier stage whose final state this stage began from.
      batches: State of the iterator over batches, or None if the stage has none.
    """

    step: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    finished: bool = False
    began_from: Mapping[str, int] = MappingProxyType({})
    batches: Any = None


class Checkpoints:
    """The checkpoints of one stage, in folders `folder/<step>`; the newest `keep` stay.

    Every checkpoint holds the digests of its files. A damaged checkpoint is skipped, and replaced
    by the next one that is written. `about` gives facts about the rest of the run at the time of a
    save, as JSON, which `facts` returns later.

    Attributes:
      folder: Folder of the stage's checkpoints, an absolute path.
      damaged: What is wrong with each damaged checkpoint, by its step.
    """

    def __init__(
        self, folder: Path, keep: int, about: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        self.folder = folder.absolute()
        self.damaged: dict[int, str] = {}
        self._keep = keep
        self._about = about
        self._whole: dict[int, CheckpointMetadata] = {}
        handlers = {"state": ocp.StandardCheckpointHandler(), "mark": ocp.JsonCheckpointHandler()}
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            steps = [int(name) for path in self.folder.iterdir() if (name := path.name).isdecimal()]
        except OSError as error:
            raise SaveError(f"cannot write to {self.folder}: {error}") from error
        for step in sorted(steps):
            try:
                self._whole[step] = self._verified(step)
            except PermissionError as error:  # it may be whole
                raise SaveError(f"cannot read step {step} in {self.folder}: {error}") from error
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.damaged[step] = _first_line(error)

    def all_metadata(self) -> list[CheckpointMetadata]:
        """The metadata of all whole checkpoints, oldest first."""
        return list(self._whole.values())

    def latest(self) -> CheckpointMetadata:
        """The metadata of the newest whole checkpoint, or of step 0 if there is none."""
        return max(
            self._whole.values(), key=lambda metadata: metadata.step, default=CheckpointMetadata()
        )

    def facts(self, step: int) -> dict[str, Any]:
        """What `about` gave when the checkpoint at `step` was written."""
        return self._content(step)["about"]  # type: ignore[no-any-return]

    def save(self, state: Any, metadata: CheckpointMetadata) -> None:
        """Writes a checkpoint at `metadata.step`, then deletes all but the newest `keep`.

        Raises SaveError, which names the folder and the newest whole checkpoint.
        """
        new = self.folder / f"{metadata.step}.new"
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            # This is the name of the folder on disk, which checkpoints of any age share.
            mark=ocp.args.JsonSave({**metadata._asdict(), "began_from": dict(metadata.began_from)}),
        )
        try:
            # A checkpoint is written beside its place and renamed: it is whole or absent.
            self._clear(new)  # else Orbax warns about what a killed process left
            self._checkpointer.save(new, args=arguments, force=True)
            self._write_digests(new, metadata.step)
            self.set_aside(metadata.step)
            new.rename(self.folder / str(metadata.step))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            self._clear(new)
            whole = max(self._whole, default=None)
            kept = "there is no earlier one" if whole is None else f"step {whole} is whole"
            raise SaveError(
                f"cannot save step {metadata.step} in {self.folder} ({kept}): {_first_line(error)}"
            ) from error
        self._whole[metadata.step] = metadata
        self._whole = dict(sorted(self._whole.items())[-self._keep :])
        self._clean_up()

    def restore(self, like: Any) -> Any:
        """The state of the newest whole checkpoint, with the structure and placement of `like`.

        Raises SaveError if what was saved has another structure, or an array of another shape or
        dtype.
        """
        path = self.folder / str(self.latest().step)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        try:
            # Orbax would cast a dtype in silence, and leave threads that crash at another shape.
            saved = self._checkpointer.metadata(path).item_metadata["state"].tree
            if different := _difference(_arrays(saved), _arrays(like)):
                raise ValueError(different)
            return self._checkpointer.restore(path, args=arguments)["state"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise SaveError(f"{path} does not fit this run: {_first_line(error)}") from error

    def set_aside(self, step: int) -> None:
        """Renames the checkpoint at `step`, if there is one; the next save deletes it."""
        path = self.folder / str(step)
        if path.exists():
            aside = path.with_name(f"{step}.aside")
            _remove(aside)
            path.rename(aside)
        self._whole.pop(step, None)

    def close(self) -> None:
        """Frees what Orbax holds."""
        self._checkpointer.close()

    def _verified(self, step: int) -> CheckpointMetadata:
        """The metadata of the checkpoint at `step`.

        Raises ValueError if any file of the checkpoint was changed, added or removed.
        """
        path, content = self.folder / str(step), self._content(step)
        if (content["stage"], content["step"]) != (self.folder.name, step):
            raise ValueError(f"is step {content['step']} of {content['stage']}")
        written, found = content["files"], _files(path)
        for name in sorted({*written} ^ {*found}):
            raise ValueError(f"{name} is {'missing' if name in written else 'not its own'}")
        for name, digest in written.items():
            if not found[name].is_file():
                raise ValueError(f"{name} is not a file")
            if file_digest(found[name]) != digest:
                raise ValueError(f"{name} differs from its digest")
        return CheckpointMetadata(**json.loads((path / "mark" / "metadata").read_text()))

    def _content(self, step: int) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(unsealed(self.folder / str(step) / DIGESTS))
        return content

    def _write_digests(self, path: Path, step: int) -> None:
        content = {
            "stage": self.folder.name,
            "step": step,
            "files": {name: file_digest(file) for name, file in _files(path).items()},
            "about": dict(self._about()),
        }
        (path / DIGESTS).write_text(sealed(json.dumps(content, indent=1) + "\n"))

    def _clear(self, new: Path) -> None:
        """Deletes what an unfinished save to `new` left, Orbax's own folders included."""
        for rest in self.folder.glob(f"{new.name}*"):
            _remove(rest)

    def _clean_up(self) -> None:
        """Deletes old checkpoints, and what was half written or deleted when a process ended."""
        for path in self.folder.iterdir():
            step, _, rest = path.name.partition(".")
            if not step.isdecimal() or (not rest and int(step) in self._whole):
                continue
            if not rest:  # a half-deleted checkpoint must not be taken for a damaged one
                path = path.rename(path.with_name(f"{step}.aside"))
            _remove(path)


def _arrays(state: Any) -> dict[str, str]:
    """The dtype and shape of each array of a state as Orbax keeps them, by its place."""
    found = {}
    for place, leaf in jax.tree.leaves_with_path(state):
        kept = leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kept = jax.eval_shape(jax.random.key_data, leaf)
        name = jax.tree_util.keystr(place, simple=True, separator=".")
        found[name] = f"{kept.dtype}{[*kept.shape]}"
    return found


def _difference(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """The first array that a checkpoint and a run do not share, in words; empty for none."""
    for name in wanted:
        if name not in saved:
            return f"it has no {name}"
        if saved[name] != wanted[name]:
            return f"{name} is {saved[name]} in it and {wanted[name]} here"
    return next((f"it also has {name}" for name in saved if name not in wanted), "")


def _files(path: Path) -> dict[str, Path]:
    """All files below `path` but the digests, by their names relative to it."""
    found = []
    for folder, folders, names in os.walk(path, onerror=_raise):  # rglob hides what it may not read
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [Path(folder, name) for name in [*names, *links]]
    named = {each.relative_to(path).as_posix(): each for each in sorted(found)}
    return {name: each for name, each in named.items() if name != DIGESTS}


def _raise(error: OSError) -> None:
    raise error


def _remove(path: Path) -> None:
    """Deletes a file, a link or a folder; what cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
