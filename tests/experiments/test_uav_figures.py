"""Pictures of a flight over the map."""

import jax
from PIL import Image

from experiments.analysis.uav_figures import coverage, draw_flight, write_flight_gif
from experiments.tasks.uav_play import flight, random_walk
from trustjax.envs import MultiUAV
from trustjax.envs.joint import joint


def test_a_flight_is_drawn_and_moves(tmp_path):
    env = MultiUAV(num_uavs=2, num_users=4, max_steps_in_episode=4)
    states = flight(joint(env), random_walk(joint(env)), jax.random.key(0))
    assert states.step.tolist() == [0, 1, 2, 3]  # before each step until the time limit
    last = jax.tree.map(lambda x: x[-1], states)
    assert coverage(env, last, cells=8).shape == (8, 8)
    draw_flight(env, states, tmp_path / "flight.png")
    assert (tmp_path / "flight.png").stat().st_size > 20_000
    write_flight_gif(env, states, tmp_path / "flight.gif")
    with Image.open(tmp_path / "flight.gif") as picture:
        assert picture.n_frames == 4
