"""Pictures of a flight over the map."""

import jax
from PIL import Image

from experiments.analysis.uav_figures import (
    coverage,
    draw_flight,
    fly,
    random_act,
    write_flight_gif,
)
from trustjax.envs import MultiUAV


def test_a_flight_is_drawn_and_moves(tmp_path):
    env = MultiUAV(num_uavs=2, num_users=4, max_steps_in_episode=4)
    flight = fly(env, random_act(env), jax.random.key(0), max_steps=10)
    assert len(flight.states.step) == 5  # the start, and four steps until the time limit
    last = jax.tree.map(lambda x: x[-1], flight.states)
    assert coverage(env, last, cells=8).shape == (8, 8)
    draw_flight(env, flight, tmp_path / "flight.png")
    assert (tmp_path / "flight.png").stat().st_size > 20_000
    write_flight_gif(env, flight, tmp_path / "flight.gif")
    with Image.open(tmp_path / "flight.gif") as picture:
        assert picture.n_frames == 5
