"""The entry point of experiments.

python -m experiments.run +exp=NAME [key=value ...]      run an experiment
python -m experiments.run --multirun +exp=NAME key=1,2   one run for each value
python -m experiments.run resume=FOLDER                  continue a run
python -m experiments.run resume=FOLDER edited=config.yaml   continue it as you edited it
python -m experiments.run                                list the experiments
"""

import contextlib
import io
import os
import re
import sys
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.runtime.config import (
    CONF,
    Root,
    check_config,
    check_values,
    experiments,
    read_config,
    to_plain,
)
from experiments.runtime.overrides import (
    check_overrides,
    check_read,
    composed,
    explained,
    one_line,
    parse,
    resumed_config,
)
from experiments.runtime.targets import ConfigError, nearest_name, shown
from experiments.sweep import jobs

_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"
_QUESTIONS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i")
_COMPLETION = ("--shell-completion", "-sc")
_WITH_VALUE = (
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--package", "-p"),
)
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def main() -> None:
    """Runs the command line; ends the process with exit code 2 for a wrong configuration."""
    arguments = sys.argv[1:]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise
    folders = [each for each in arguments if each.startswith("resume=")]
    try:
        with _one_line_errors():
            if any(each.split("=")[0] in _COMPLETION for each in arguments):
                _complete()
            elif folders:
                _resume(folders, [each for each in arguments if each not in folders])
            else:
                _start(arguments)
    except KeyboardInterrupt:  # before any training began
        sys.exit(130)


def _start(arguments: list[str]) -> None:
    if any(each.startswith("--e") for each in arguments):  # --experimental-rerun, or short for it
        raise ConfigError("--experimental-rerun: not allowed, as it reads a pickle")
    overrides = [each for each in arguments if each[:1] == "~" or (each[:1] != "-" and "=" in each)]
    checked = check_overrides(overrides)
    if not any(each.split("=")[0] in _QUESTIONS for each in arguments):
        names = [each.removeprefix("+exp=") for each in checked if each.startswith("+exp=")]
        _check_experiments(names[-1].split(",") if names else [""])
        _check_rest([each for each in arguments if each not in overrides])
    if {"--multirun", "-m"} & {*arguments}:
        for job in jobs(overrides):
            check_config(composed(job.overrides))
    sys.argv[1:] = [each for each in arguments if each not in overrides] + checked
    try:
        _job()
    except OSError as error:
        raise ConfigError(f"hydra.run.dir: {error}") from error
    except Exception as error:  # Hydra could not compose; `_job` handles the errors of a run
        raise explained(error, checked) from error


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


def _check_rest(arguments: list[str]) -> None:
    """Raises ConfigError for a word that is no override, no option and no option's value."""
    for before, each in zip(["", *arguments], arguments, strict=False):
        if each[:1] != "-" and before not in _WITH_VALUE:
            raise ConfigError(f"{each}: got no value, allowed: key=value")


def _complete() -> None:
    """Tab completion for `python -m experiments.run`; Hydra's own completes `python FILE` only."""
    line = os.environ.get("COMP_LINE", "")
    os.environ["COMP_LINE"] = re.sub(r"^\s*\S+\s+-m\s+experiments\.run\b", "python run.py", line)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            _job()
    except Exception as error:  # Hydra takes the argument for a command of its own
        raise ConfigError(f"--shell-completion: {error}") from error
    python = 'if [ "${words[0]}" == "python" ]; then'
    module = 'if [ "${words[1]} ${words[2]}" == "-m experiments.run" ]; then\n'
    module += '        helper="${words[0]} -m experiments.run"\n'
    print(printed.getvalue().replace(python, f"{module}    el{python}"), end="")


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _job(config: DictConfig) -> None:
    about = HydraConfig.get()
    folder = Path(about.runtime.output_dir)
    try:
        with _one_line_errors():
            check_read(config, about.runtime.choices)
            if about.mode == RunMode.MULTIRUN:
                parsed = [parse(each) for each in sys.argv[1:] if each[:1] != "-" and "=" in each]
                keys = [each.get_key_element() for each in parsed if each.is_sweep_override()]
                own = [each for each in about.overrides.task if each.partition("=")[0] in keys]
                print(f"job {about.job.num}: {' '.join(own)}", flush=True)
            _train(folder, to_plain(config), resumed=False)
    except Exception:  # printed here, as Hydra would add lines of its own
        traceback.print_exc()
        sys.exit(1)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails, as it should, if anything was written


def _resume(folders: list[str], arguments: list[str]) -> None:
    if len(folders) > 1 or any(each.startswith("-") for each in arguments):
        raise ConfigError("resume: got more than a folder and overrides, allowed: one folder")
    given = folders[0].removeprefix("resume=")
    try:
        folder = Path(given).expanduser()
    except RuntimeError as error:  # an unknown ~user
        raise ConfigError(f"resume: got {shown(given)}: {error}") from error
    edited = [each for each in arguments if each.startswith("edited=")]
    for each in edited:
        if each != "edited=config.yaml":
            raise ConfigError(f"edited: got {shown(each[7:])}, allowed: config.yaml")
    arguments = [each for each in arguments if each not in edited]
    try:
        config = resumed_config(folder, arguments)
    except ConfigError as error:
        if isinstance(error.__cause__, PermissionError):
            _fail(str(error), 1)
        raise
    for name in typing.get_type_hints(Root):
        if name not in config:
            raise ConfigError(f"{folder / 'config.yaml'}: {name} is missing")
    changed = tuple(parse(each).key_or_group.removeprefix("task.") for each in arguments)
    try:
        _train(folder, config, resumed=True, edited=bool(edited))
    except ConfigError as error:
        if error.key.removeprefix("task.").startswith(changed):
            raise
        raise read_config(folder / "config.yaml").locate(error) from error


def _train(folder: Path, config: dict[str, Any], *, resumed: bool, edited: bool = False) -> None:
    check_values(config, Root, whole=True)
    set_environment(deterministic=config["deterministic"])  # before JAX is imported
    config = check_config(config)
    from experiments.runtime import session  # imports JAX and Orbax, which takes seconds
    from experiments.runtime.files import SaveError
    from experiments.runtime.task import Diverged
    from trustjax._checks import MissingPackageError

    try:
        code = session.train_in_folder(folder, config, resumed=resumed, edited=edited)
    except (Diverged, MissingPackageError, SaveError) as error:
        _fail(str(error), 1)
    if code:
        sys.exit(code)


def set_environment(*, deterministic: bool) -> None:
    """Sets the environment variables that XLA reads when it starts."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no C++ logs
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and _DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Prints a configuration error as one line, or with a traceback if HYDRA_FULL_ERROR=1."""
    try:
        yield
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        if _TRACEBACKS:
            raise
        _fail(one_line(error), 2)


def _fail(text: str, code: int) -> NoReturn:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
