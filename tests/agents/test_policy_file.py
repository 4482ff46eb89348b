"""Files of policies: what is written, and what is refused."""

import dataclasses
import json
import os
import stat
import struct
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.agents import PPO, load_policy, ppo
from trustjax.envs import make

CONFIG = ppo.Config(
    env="probe:observation", num_envs=2, num_steps=2, total_steps=8, num_minibatches=1,
    hidden=(3,), normalize_observations=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def policy():
    agent = PPO(CONFIG)
    return agent.policy(agent.init(jax.random.key(0)))


@pytest.fixture
def saved(policy, tmp_path):
    """The path of a good file, and its arrays."""
    path = tmp_path / "policy.npz"
    policy.save(path)
    with np.load(path) as file:
        return path, dict(file)


def about_of(arrays, **changes):
    about = json.loads(str(arrays["about"]))
    about["actor"] |= changes.pop("actor", {})
    return arrays | {"about": np.array(json.dumps(about | changes))}


def without(arrays, *names):
    return {name: array for name, array in arrays.items() if name not in names}


KERNEL, BIAS = "variables/params/dense_0/kernel", "variables/params/dense_0/bias"
CHANGES = {
    "lost mean": (lambda a: without(a, "statistics/mean"), "must have statistics/mean"),
    "lost normaliser": (
        lambda a: without(a, *(n for n in a if n.startswith("statistics"))),
        "must have statistics/mean",
    ),
    "added normaliser": (lambda a: about_of(a, normalized=False), "must not have 'statistics/"),
    "lost weights": (lambda a: without(a, BIAS), f"must have {BIAS}"),
    "lost clip": (lambda a: without(a, "clip_observations"), "must have clip_observations"),
    "lost about": (lambda a: without(a, "about"), "about must be a text"),
    "extra": (lambda a: a | {"variables/params/x": np.zeros(1)}, "must not have 'variables/par"),
    "shape": (lambda a: a | {BIAS: np.zeros(4, "f4")}, rf"{BIAS} must have shape \(3,\), got \(4,"),
    "dtype": (lambda a: a | {BIAS: a[BIAS].astype("f8")}, "variables must have one dtype, got"),
    "half": (lambda a: a | {BIAS: a[BIAS].astype("f2")}, f"{BIAS} must be float32 or float64, got"),
    "integers": (lambda a: a | {BIAS: np.zeros(3, int)}, f"{BIAS}': it must be floating, got"),
    "nan": (lambda a: a | {BIAS: np.full(3, np.nan, "f4")}, f"{BIAS} must be finite"),
    "inf mean": (
        lambda a: a | {"statistics/mean": np.full(1, np.inf, "f4")},
        "statistics/mean must be finite",
    ),
    "variance": (
        lambda a: a | {"statistics/variance": np.full(1, -1, "f4")},
        "statistics/variance must be >= 0",
    ),
    "clip": (
        lambda a: a | {"clip_observations": np.float32(0)},
        r"clip_observations must be > 0, got 0\.0",
    ),
    "overflow": (
        lambda a: a | {n: np.full(x.shape, 1e300) for n, x in a.items() if n.startswith("var")},
        "must be finite",
    ),
    "json": (lambda a: a | {"about": np.array("{")}, "about must be JSON"),
    "deep": (lambda a: a | {"about": np.array("[" * 100_000)}, "about must be JSON"),
    "list": (lambda a: a | {"about": np.array("[1]")}, r"about must be an object, got \[1\]"),
    "twice": (
        lambda a: a | {"about": np.array('{"env": 1, "env": 2}')},
        "a key is there twice",
    ),
    "format": (lambda a: about_of(a, format="trustjax policy 9"), "its format is 'trustjax policy"),
    "env": (lambda a: about_of(a, env=3), r"about\.env must be a name, got 3"),
    "no env": (lambda a: about_of(a, env="probe:x"), r"about\.env: unknown environment"),
    "env option": (lambda a: about_of(a, env="probe:both?max_steps_in_episode={}"), r"about\.env"),
    "more": (lambda a: about_of(a, more=1), "about must not have 'more'"),
    "flag": (lambda a: about_of(a, normalized=1), r"about\.normalized must be true or false"),
    "actor": (lambda a: about_of(a, actor={"more": 1}), r"about\.actor must not have 'more'"),
    "hidden": (
        lambda a: about_of(a, actor={"hidden": 3}),
        r"about\.actor\.hidden must be a list of whole numbers >= 1, got 3",
    ),
    "hidden true": (lambda a: about_of(a, actor={"hidden": [True]}), r"about\.actor\.hidden must"),
    "large": (
        lambda a: about_of(a, actor={"hidden": [2**62]}),
        r"about\.actor\.hidden: there are \d+ numbers, too few for",
    ),
    "gru": (lambda a: about_of(a, actor={"gru_size": 10**9}), r"about\.actor\.gru_size: there are"),
    "many": (
        lambda a: about_of(a, actor={"hidden": [1] * 10_000}),
        r"about\.actor\.hidden: there are no 10000 layers",
    ),
    "deeper": (lambda a: about_of(a, actor={"hidden": [3, 3]}), "must have variables/params/dense"),
    "activation": (
        lambda a: about_of(a, actor={"activation": ["tanh"]}),
        r"about\.actor\.activation must be one of",
    ),
    "std": (
        lambda a: about_of(a, actor={"initial_log_std": float("nan")}),
        r"about\.actor\.initial_log_std must be a number",
    ),
    "range": (
        lambda a: about_of(a, actor={"log_std_range": [2, -5]}),
        r"about\.actor\.log_std_range must be two numbers",
    ),
    "actions": (
        lambda a: about_of(a, actor={"num_actions": 3}),
        r"about\.actor\.num_actions must be \d, as in 'probe:observation', got 3",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_arrays(name, saved):
    path, arrays = saved
    change, message = CHANGES[name]
    np.savez(path, **change(arrays))
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(path)
    assert str(caught.value).startswith(f"{path} must be a policy saved by trustjax: ")
    assert "\n" not in str(caught.value)


def header(descr="'<f4'", shape="(3,)", size=118):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", size) + text.ljust(size - 1).encode() + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        header(shape="(1099511627776,)") + bytes(12),
        header(shape="(2, -6)") + bytes(12),
        header(shape="(3.0,)") + bytes(12),
        header(descr="'|O'") + b"cos\nsystem\n(S'exit 1'\ntR.",
        header(descr="[('a', '<f4')]") + bytes(12),
        header(descr="'<f9'") + bytes(12),
        header(shape="(" * 60) + bytes(12),
        header() + bytes(11),
        header()[:40],
        b"\x93NUMPY\x03\x00" + header()[8:],
        b"",
    ],
    ids=[
        "4 TiB",
        "negative",
        "float",
        "pickle",
        "record",
        "f9",
        "deep",
        "short",
        "cut",
        "v3",
        "no",
    ],
)
def test_crafted_headers(content, saved):
    path, _ = saved
    before = path.read_bytes()
    path.unlink()
    rewrite(before, path, BIAS, content)
    with pytest.raises(ValueError, match=f"policy saved by trustjax: '{BIAS}") as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


def rewrite(before, path, name, content=None, **options):
    """The same .npz with another content of an array, or stored otherwise."""
    (path.parent / "before").write_bytes(before)
    with (
        zipfile.ZipFile(path.parent / "before") as old,
        zipfile.ZipFile(path, "w") as new,
    ):
        for member in old.namelist():
            changed = member == f"{name}.npy"
            data = content if changed and content is not None else old.read(member)
            new.writestr(member, data, **(options if changed else {}))


def test_zips(saved):
    path, _ = saved
    good = path.read_bytes()
    rewrite(good, path, BIAS, bytes(10**6), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"bias\.npy' must not be compressed"):
        load_policy(path)
    with zipfile.ZipFile(path, "w") as new:
        new.writestr(f"{BIAS}.npy", header() + bytes(12))
        with pytest.warns(UserWarning, match="Duplicate"):
            new.writestr(f"{BIAS}.npy", header() + bytes(12))
    with pytest.raises(ValueError, match=f"'{BIAS}' is there twice"):
        load_policy(path)
    for cut in (10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError, match="policy saved by trustjax"):
            load_policy(path)
    flipped = bytearray(good)
    flipped[good.index(b"\x93NUMPY", 2000) + 130] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        load_policy(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "none.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path, tmp_path / "pipe.npz"):
        with pytest.raises(ValueError, match="saved by trustjax: it is no file"):
            load_policy(path)


def test_files_without_the_flag_are_read(saved):
    """The first ones did not say whether observations are normalised."""
    path, arrays = saved
    about = json.loads(str(arrays["about"]))
    del about["normalized"]
    np.savez(path, **arrays | {"about": np.array(json.dumps(about))})
    assert load_policy(path).statistics is not None


class TestEnvironmentParameters:
    """Of the environment in which the policy was trained."""

    @pytest.fixture
    def pole(self, tmp_path):
        """A policy of CartPole with a heavy pole and a short limit, and the path of its file."""
        params = make("gymnax:CartPole-v1").default_params
        params = params.replace(max_steps_in_episode=20, gravity=12)
        agent = PPO(dataclasses.replace(CONFIG, env="gymnax:CartPole-v1", env_params=params))
        policy = agent.policy(agent.init(jax.random.key(0)))
        policy.save(tmp_path / "policy.npz")
        return policy, tmp_path / "policy.npz"

    def test_are_in_the_file(self, pole):
        policy, path = pole
        found = load_policy(path)
        assert found.env_params == policy.env_params
        assert isinstance(found.env_params.max_steps_in_episode, int)
        assert isinstance(found.env_params.gravity, float)
        found, expected = (p.evaluate(jax.random.key(0), 4).lengths for p in (found, policy))
        np.testing.assert_array_equal(found, expected)
        assert np.max(found) <= 20

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"gravity": None}, "it must have env_params/gravity"),
            ({"more": np.ones(())}, "it must not have 'env_params/more'"),
            ({"gravity": np.ones(1)}, r"env_params/gravity must have shape \(\), got \(1,\)"),
            (
                {"max_steps_in_episode": np.float64(3)},
                "must be of a kind with int64, got 'float64'",
            ),
            (
                {"gravity": np.array("9.8")},
                "'env_params/gravity': it must be of numbers, got '<U3'",
            ),
        ],
    )
    def test_that_differ_are_refused(self, pole, changes, message):
        _, path = pole
        with np.load(path) as file:
            arrays = dict(file)
        arrays |= {f"env_params/{name}": array for name, array in changes.items()}
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        with pytest.raises(ValueError, match=message):
            load_policy(path)

    def test_of_another_kind_are_not_written(self, pole):
        policy, path = pole
        wrong = policy.env_params.replace(max_steps_in_episode=2.5)
        for params, message in (
            ({"gravity": 9.8}, "env_params must have the structure"),
            (wrong, "env_params/max_steps_in_episode: .*float64.*int64"),
        ):
            with pytest.raises(ValueError, match=f"this policy cannot be saved: {message}"):
                dataclasses.replace(policy, env_params=params).save(path)

    def test_are_not_there_by_default(self, saved):
        path, arrays = saved
        assert not any(name.startswith("env_params") for name in arrays)
        assert load_policy(path).env_params is None


def test_mode(policy, tmp_path):
    before = os.umask(0o027)
    try:
        policy.save(tmp_path / "policy.npz")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "policy.npz").stat().st_mode) == 0o640


def test_repr_is_one_line(policy):
    text = repr(policy)
    assert text.startswith("Policy(env='probe:observation', hidden=(3,), gru_size=None, ")
    assert "Array" not in text
    assert "\n" not in text


def test_what_cannot_be_read_is_not_written(policy, tmp_path):
    path = tmp_path / "policy.npz"
    spoilt = jax.tree.map(lambda x: x * jnp.nan, policy.variables)
    several = jax.tree.map(lambda x: x[None], policy.variables)
    for variables, message in ((spoilt, "must be finite"), (several, "must have shape")):
        with pytest.raises(ValueError, match=f"this policy cannot be saved: .*{message}"):
            dataclasses.replace(policy, variables=variables).save(path)
    assert not list(tmp_path.iterdir())


def test_no_episodes(policy):
    with pytest.raises(ValueError, match="num_episodes must be >= 1, got 0"):
        policy.evaluate(jax.random.key(0), 0)


def test_empty_batch(policy):
    action, _ = policy.act(jnp.zeros((0, 1)), jax.random.key(0))
    assert action.shape == (0,)


def test_a_file_of_an_earlier_version():
    """Written before networks, environments and actors of one's own; probe:memory, with a GRU."""
    policy = load_policy(Path(__file__).parents[1] / "golden" / "policy_file.npz")
    seen = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    action, carry = policy.act(seen, jax.random.key(0), deterministic=True)
    np.testing.assert_array_equal(action, [1, 0, 0, 0])
    expected = [
        [0.24608856, 0.7444102, -0.51279163], [0.01479857, -0.21576743, -0.01283193],
        [0.12402959, 0.10762215, -0.16260004], [-0.41423553, 0.15531318, 0.22919081],
    ]  # fmt: skip
    np.testing.assert_allclose(carry, expected, rtol=1e-5)
