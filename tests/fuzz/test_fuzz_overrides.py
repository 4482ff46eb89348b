"""Overrides on the command line, right, wrong and absurd: fine, or one line."""

import random
import sys
import tempfile
import traceback
from pathlib import Path

import odd
import pytest
from commands import call, guarded
from guard import fuzz

from experiments import run
from experiments.runtime.config import flat, groups, to_plain
from experiments.runtime.overrides import check_read, compose, composed

EXPERIMENTS = ("two_minima", "mirror_descent", "ppo_cartpole", "sam_vision")
SIGNS = "=#([{}]),:'\"\\~$*&%@!?;|<> \t\n\0.+-_/aZ09\u00fc\u65e5"


def _text(draw: random.Random) -> str:
    kind = draw.randrange(5)
    if kind == 0:
        return "".join(draw.choice(SIGNS) for _ in range(draw.randrange(12)))
    if kind == 1:
        return draw.choice(odd.TEXTS)
    if kind == 2:
        return draw.choice(odd.TARGETS)
    if kind == 3:
        found = [
            "range(0,3)",
            "range(0,10**9)",
            "range(1000000000)",
            "interval(0,1)",
            "choice(1,2)",
        ]
        found += ["glob(*)", "sort(3,1)", "shuffle(1,2)", "int(3)", "float(abc)", "str([1])"]
        found += ["tag(a,1)", "1,2", "[1,2],[3]", "{a:1}", "null", "true", "1e-3", "0", "-1"]
        return draw.choice(found)
    return str(odd.value(draw)).replace("None", "null")


def _argument(keys: list[str], draw: random.Random) -> str:
    key = draw.choice(keys)
    kind = draw.randrange(10)
    if kind == 0:
        at = draw.randrange(len(key))
        key = key[:at] + draw.choice(SIGNS) + key[at + draw.randrange(2) :]
    elif kind == 1:
        key += f".{draw.choice([*odd.NAMES, 'x'])}"
    elif kind == 2:
        key = draw.choice([*groups(), "hydra.run.dir", "hydra.job.num", "hydra", "resume", "exp"])
    sign = draw.choice(["", "", "", "", "+", "++", "~"])
    if draw.random() < 0.03:
        return draw.choice(["--multirun", "-m", "--cfg", "--info", "-x", key, "--cfg=job", "-sc"])
    return f"{sign}{key}={_text(draw)}" if draw.random() < 0.97 else f"{sign}{key}"


def _composed_once() -> None:
    config, choices = compose(sys.argv[1:])
    try:
        with run._one_line_errors():
            check_read(config, choices)
            config["exp"] = choices["exp"]
            run._train(Path(tempfile.mkdtemp()), to_plain(config), resumed=False)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


@pytest.mark.slow
def test_fuzz_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    keys = {}
    for exp in EXPERIMENTS:
        keys[exp] = [*flat(composed([f"+exp={exp}"]))]

    def attempt(seed: int) -> str:
        draw = random.Random(seed)
        exp = draw.choice(["two_minima", *EXPERIMENTS])
        arguments = [f"+exp={exp}"]
        arguments += [_argument(keys[exp], draw) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
        # Hydra's own entry composes twice, so that only some inputs take all of it.
        options = any(each.startswith("-") for each in arguments)
        with pytest.MonkeyPatch.context() as patch:
            if seed % 10 and not options:
                patch.setattr(run, "_job", _composed_once)
            return call(*arguments)

    with guarded(tmp_path):
        for exp in EXPERIMENTS:
            assert call(f"+exp={exp}") == "exit code 0"
        fuzz("overrides", tmp_path, attempt)
