"""Damaged policies: a policy that acts, or a ValueError of one line."""

import io
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guard import fuzz
from mutating import ABSURD, Random, damaged, edited

from trustjax.agents import PPO, load_policy, ppo

pytestmark = pytest.mark.slow

SHARED = {"num_envs": 2, "num_steps": 2, "total_steps": 8, "num_minibatches": 1, "hidden": (3,)}
CONFIGS = (
    ppo.Config(env="probe:observation", normalize_observations=True, **SHARED),
    ppo.Config(env="probe:continuous", gru_size=2, normalize_observations=False, **SHARED),
)
DESCRIPTIONS = ["'|O'", "'<f8'", "'<i4'", "'|V4'", "'<U4'", "'>f4'", "[('a', '<f4')]", "3"]
SHAPES = ["()", "(2**40,)", "(1099511627776,)", "(-1,)", "(3, -1)", "(True,)", "3", "(1.0,)"]
Members = dict[str, bytes]


def npy(random: Random, content: bytes) -> bytes:
    """An array whose header says something else, in as many bytes or with its length mended."""
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length], content[10 + length :]
    match random.integers(4):
        case 0:
            header = damaged(random, header)
        case 1:
            order = random.choice(["0", "True", "False"])
            text = (
                f"{{'descr': {random.choice(DESCRIPTIONS)}, 'fortran_order': {order}, "
                f"'shape': {random.choice(SHAPES)}, }}\n"
            )
            header = text.encode()
        case 2:
            data = damaged(random, data)
        case _:
            return damaged(random, content)
    return content[:8] + len(header).to_bytes(2, "little") + header + data


def number(random: Random, content: bytes) -> bytes:
    """An array of which one number is another."""
    array = np.load(io.BytesIO(content))
    if array.dtype.kind == "f":
        array.reshape(-1)[random.integers(array.size)] = random.choice(
            [np.nan, np.inf, -1.0, 1e38, 0.0]
        )
    return saved(array)


def about(random: Random, content: bytes) -> bytes:
    """The text with another value, or a damaged one."""
    text = str(np.load(io.BytesIO(content)))
    if random.integers(3):
        text = json.dumps(edited(random, json.loads(text)))
    else:
        text = damaged(random, text.encode()).decode("latin1")
    return saved(np.array(text))


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def packed(random: Random, members: Members) -> bytes:
    file = io.BytesIO()
    squeezed = random.choice([0] * 9 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(file, "w", int(squeezed)) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def changed(random: Random, members: Members) -> bytes:
    """The file with one of the arrays changed, lost, renamed, added or exchanged."""
    members = dict(members)
    names = list(members)
    name, other = (names[random.integers(len(names))] for _ in range(2))
    match random.integers(8):
        case 0:
            members[name] = npy(random, members[name])
        case 1:
            members[name] = number(random, members[name])
        case 2 | 3 | 4:
            members["about.npy"] = about(random, members["about.npy"])
        case 5:
            del members[name]
        case 6:
            members[name], members[other] = members[other], members[name]
        case _:
            new = str(ABSURD[random.integers(len(ABSURD))]).replace("\ud800", "")[:100]
            members[f"variables/{new}.npy"] = members[name]
    return packed(random, members)


def test_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good, path = [], tmp_path / "policy.npz"
    for config in CONFIGS:
        agent = PPO(config)
        agent.policy(agent.init(jax.random.key(0))).save(path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        good.append((path.read_bytes(), members))
    act = jax.jit(lambda policy, x, key: policy.act(x, key)[0])

    def attempt(seed: int) -> None:
        random = np.random.default_rng(seed)
        whole, members = good[random.integers(len(good))]
        kind = random.integers(4)
        path.write_bytes(damaged(random, whole) if kind == 0 else changed(random, members))
        policy = load_policy(path)
        repr(policy)
        leaves = jax.tree.leaves(policy.variables)
        assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in leaves)
        observation = jnp.ones((1, *policy.environment.observation_shape))
        assert act(policy, observation, jax.random.key(0)).shape[0] == 1

    fuzz("policy", tmp_path, attempt, (ValueError,))
