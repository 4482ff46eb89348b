"""The code blocks of README and docs run as they stand there."""

import contextlib
import dataclasses
import importlib.util
import io
import re
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import trustjax.geometry
import trustjax.losses
import trustjax.models
import trustjax.optim

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)

# Pages whose blocks compile for many seconds.
LONG = (
    "interoperability",
    "mdpo",
    "mirror",
    "natural",
    "pretrained",
    "regularizer",
    "text",
    "your_own",
)

# Packages of single blocks, which the development extra does not install.
OPTIONAL = ("craftax", "jumanji", "tunix")

# What would take long or needs the network, by what is quick and at hand.
SMALLER = {
    "brax:hopper?backend=generalized": "gymnax:Pendulum-v1",
    "total_steps=1_024_000": "total_steps=64, num_envs=2, num_steps=16, num_minibatches=2",
    "total_steps=40_960, num_envs=8": "total_steps=1024, num_envs=8, learning_starts=512",
    "google/vit-base-patch16-224-in21k": str(ROOT / "tests/golden/vit/classifier"),
}


def blocks(path: Path) -> list[str]:
    return [textwrap.dedent(code) for _, code in BLOCK.findall(path.read_text(encoding="utf-8"))]


def surroundings() -> dict[str, Any]:
    """What the pages take for granted: the library's names, and a small problem to solve."""
    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "optax": optax, "nnx": nnx, "np": np}
    names["dataclasses"] = dataclasses
    for module in (trustjax.geometry, trustjax.losses, trustjax.models, trustjax.optim):
        names |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    from trustjax.envs import Environment

    names["Environment"] = Environment
    key = jax.random.key(0)
    x = jax.random.normal(key, (16, 2))
    batch = {"x": x, "y": (x[:, 0] > 0).astype(jnp.int32)}
    params = {"kernel": jnp.array([[0.5, -0.5], [0.1, 0.3]]), "bias": jnp.array([0.1, 0.2])}

    def model(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params["bias"]

    def output_fn(params: Any, batch: Any) -> jax.Array:
        return model(params, batch["x"])

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = output_fn(params, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses.mean(), {"outputs": logits}

    def loss(params: Any, batch: Any) -> jax.Array:
        return loss_fn(params, batch)[0]

    first = optax.chain(trustjax.optim.tram("previous"), optax.adamw(1e-3))
    return names | {
        "key": key, "batch": batch, "images": jnp.full((2, 8, 8, 3), 0.5), "model": model,
        "params": params, "previous": params, "grads": jax.grad(loss)(params, batch),
        "output_fn": output_fn, "logits_fn": output_fn, "loss_fn": loss_fn, "loss": loss,
        "logits": output_fn(params, batch), "old_logits": output_fn(params, batch),
        "state": first.init(params), "opt_state": first.init(params),
    }  # fmt: skip


def run(code: str, names: dict[str, Any], where: str) -> str:
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, where, "exec"), names)
    return printed.getvalue()


def test_the_example_of_the_readme_is_whole_and_learns() -> None:
    (code,) = blocks(ROOT / "README.md")
    assert len(code.splitlines()) <= 30
    accuracy, radius = map(float, run(code, {"__name__": "readme"}, "README.md").split())
    assert accuracy > 0.9
    assert radius > 0


@pytest.mark.table
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in LONG))
        for page in PAGES
        if blocks(page)
    ],
)
def test_the_blocks_of_a_page_run_one_after_the_other(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names, missing = surroundings(), set()
    for number, code in enumerate(blocks(path), 1):
        needed = {name for name in OPTIONAL if re.search(rf"^(import|from) {name}\b", code, re.M)}
        absent = {name for name in needed if importlib.util.find_spec(name) is None}
        missing |= absent
        if not absent:
            run(code, names, f"{path.name}, block {number}")
    if missing:
        pytest.skip(f"blocks need {', '.join(sorted(missing))}")


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *PAGES], ids=lambda path: path.stem)
def test_links_to_files_and_headings_lead_somewhere(path: Path) -> None:
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
