"""Episodes of saved policies, as pictures."""

import sys

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import play
from trustjax.agents import PPO, ppo
from trustjax.agents.multi import mappo
from trustjax.envs import MultiUAV

SMALL = {"num_envs": 4, "num_steps": 4, "total_steps": 16, "hidden": (4,)}


def save(env, path):
    agent = PPO(ppo.Config(env=env, **SMALL))
    path.parent.mkdir(parents=True, exist_ok=True)
    agent.policy(agent.init(jax.random.key(0))).save(path)


@pytest.fixture
def run(tmp_path):
    """A run of two stages with two seeds."""
    for stage, env in (("ppo", "gymnax:CartPole-v1?max_steps_in_episode=7"), ("x", "probe:both")):
        for seed in (0, 3):
            save(env, tmp_path / "policies" / stage / f"seed_{seed}.npz")
    return tmp_path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["play", *map(str, arguments)])
    play.main()


def test_an_episode_as_a_gif(run, monkeypatch, capsys):
    """By default the first seed of the first stage; a frame for each observation, to the end."""
    call(monkeypatch, run)
    out = run / "policies" / "ppo" / "seed_0.gif"
    assert capsys.readouterr().out == f"{out}: return 7 in 7 steps\n"
    with Image.open(out) as image:
        assert image.n_frames == 8
        first = np.asarray(image.convert("RGB"))
        image.seek(7)
        assert np.any(first != np.asarray(image.convert("RGB")))
    assert not list(out.parent.glob("*.new"))


def test_the_episode_ends_with_what_the_last_step_led_to(run):
    """Not with the observation after the reset: fails if that is taken for the final one."""
    policy, _ = play._load(run / "policies" / "ppo" / "seed_0.npz", None)
    episode = play.play(policy, jax.random.key(0), max_steps=50)
    assert episode.ended
    assert episode.observations.shape == (8, 4)
    speed = np.abs(np.diff(episode.observations, axis=0)).max(axis=1)
    assert abs(episode.observations[-1]).max() > 0.05  # a reset is within 0.05
    assert speed[-1] < 0.5


def test_any_other_environment(run, monkeypatch, tmp_path):
    """As its observation over time."""
    call(monkeypatch, run, "--stage", "x", "--seed", 3, "--out", tmp_path / "a.gif", "--stochastic")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 2


def test_flying_base_stations(tmp_path):
    """Over the map; the return is the mean of the vehicles."""
    env = MultiUAV(num_uavs=2, num_users=3, max_steps_in_episode=3)
    agent = mappo.Config(env=env, **SMALL | {"total_steps": 64}).agent()
    policy = agent.policy(jax.jit(agent.init)(jax.random.key(0)))
    episode = play.play(policy, jax.random.key(0), max_steps=9)
    assert episode.rewards.shape == (3,)
    assert episode.ended
    assert episode.scenes.vehicles.shape == (3, 2, 3)
    play.draw(policy, episode, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3
    assert play.suffixes(policy.environment) == (".gif", ".png")


@pytest.mark.slow
def test_a_page_of_brax(tmp_path, monkeypatch, capsys):
    save("brax:inverted_pendulum?backend=spring", tmp_path / "p.npz")
    call(monkeypatch, tmp_path / "p.npz", "--max-steps", 3)
    assert "in 3 steps, where it was stopped" in capsys.readouterr().out
    assert "three" in (tmp_path / "p.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "pp"], "--stage: got 'pp', the nearest is ppo (there are: ppo, x)"),
        (["--seed", "2"], "--seed: got 2, the nearest is 3 (there are: 0, 3)"),
        (["--max-steps", "0"], "--max-steps: got 0"),
        (["--episode-key", "9" * 20], f"--episode-key: got {'9' * 20}, allowed: 0 to 4294967295"),
        (["--out", "x.html"], "--out: got 'x.html', allowed for gymnax:CartPole-v1"),
    ],
)
def test_refused(arguments, message, run, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, run, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_no_policies(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path)
    assert "holds no policies" in capsys.readouterr().err
    save("probe:both", tmp_path / "x.npz")
    half = (tmp_path / "x.npz").read_bytes()[:200]
    (tmp_path / "x.npz").write_bytes(half)
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path / "x.npz")
    assert "must be a policy saved by trustjax" in capsys.readouterr().err
