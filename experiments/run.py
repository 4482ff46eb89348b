"""Entry point of the experiments.

python -m experiments.run +exp=NAME [key=value ...]      run an experiment
python -m experiments.run --multirun +exp=NAME key=1,2   one run for each value
python -m experiments.run resume=FOLDER                  continue a run
python -m experiments.run                                list the experiments
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.config import (
    CONF,
    check_config,
    check_override,
    experiments,
    resumed_config,
    to_plain,
)
from experiments.targets import ConfigError, nearest_name

_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"
_QUESTIONS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i")
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def main() -> None:
    """Runs the command line; ends the process with exit code 2 for a wrong configuration."""
    arguments = sys.argv[1:]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise
    folders = [each for each in arguments if each.startswith("resume=")]
    try:
        with _one_line_errors():
            if folders:
                _resume(folders, [each for each in arguments if each not in folders])
            else:
                _start(arguments)
    except KeyboardInterrupt:  # while nothing was under way yet
        sys.exit(130)


def _start(arguments: list[str]) -> None:
    if any(each.startswith("--e") for each in arguments):  # --experimental-rerun, or short for it
        raise ConfigError("--experimental-rerun: not allowed, as it reads a pickle")
    checked = [
        check_override(each) if each[:1] != "-" and ("=" in each or each[:1] == "~") else each
        for each in arguments
    ]
    if not any(each.split("=")[0] in _QUESTIONS for each in arguments):
        names = [each.removeprefix("+exp=") for each in checked if each.startswith("+exp=")]
        _check_experiments(names[-1].split(",") if names else [""])
    sys.argv[1:] = checked
    try:
        _job()
    except OSError as error:
        raise ConfigError(f"hydra.run.dir: {error}") from error


def _check_experiments(names: list[str]) -> None:
    known = experiments()
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    if unknown[0]:
        print(f"exp: got {unknown[0]!r}, the nearest is {nearest_name(unknown[0], known)}\n")
    width = max(map(len, known))
    print("python -m experiments.run +exp=NAME, with NAME one of\n")
    for name, line in known.items():
        print(f"  {name:{width}}  {line}")
    sys.exit(2)


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _job(config: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        with _one_line_errors():
            _run(folder, to_plain(config), resumed=False)
    except Exception:  # Hydra would add lines of its own
        traceback.print_exc()
        sys.exit(1)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only where nothing was written


def _resume(folders: list[str], arguments: list[str]) -> None:
    if len(folders) > 1 or any(each.startswith("-") for each in arguments):
        raise ConfigError("resume: got more than a folder and overrides, allowed: one folder")
    folder = Path(folders[0].removeprefix("resume=")).expanduser()
    _run(folder, resumed_config(folder, arguments), resumed=True)


def _run(folder: Path, config: dict[str, Any], *, resumed: bool) -> None:
    set_environment(deterministic=config["deterministic"])
    config = check_config(config)
    from experiments import session  # imports JAX and Orbax, which takes seconds
    from experiments.loop import Diverged, SaveError

    try:
        code = session.run(folder, config, resumed=resumed)
    except (Diverged, SaveError) as error:
        _fail(str(error), 1)
    if code:
        sys.exit(code)


def set_environment(*, deterministic: bool) -> None:
    """What XLA reads from the environment when it starts."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no C++ logs
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and _DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Configuration errors as one line and exit code 2; a traceback if HYDRA_FULL_ERROR=1."""
    try:
        yield
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        if _TRACEBACKS:
            raise
        _fail(_line(error), 2)


def _line(error: Exception) -> str:
    if isinstance(error, OmegaConfBaseException):  # its other lines tell of types inside OmegaConf
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        return _line(error.__cause__)
    return str(error)


def _fail(text: str, code: int) -> NoReturn:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
