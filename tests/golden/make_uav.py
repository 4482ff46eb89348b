"""Writes tests/golden/uav.json: channel, rates, energy and steps of vehicles, in plain NumPy loops.

The formulas are written down anew here, one link at a time and in float64. The numbers of the fact
sheet on multi-vehicle networks, which were worked out before, are asserted on the way:
    python tests/golden/make_uav.py
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

LIGHT = 299_792_458.0
SCENES = {
    "suburban": (4.88, 0.43, 0.1, 21), "urban": (9.61, 0.16, 1, 20),
    "dense_urban": (12.08, 0.11, 1.6, 23), "high_rise": (27.23, 0.08, 2.3, 34),
}  # fmt: skip
# Scene, h, r, and the sheet's probability, distance, loss in free space and loss.
LOSSES = [
    ("suburban", 100, 500, 0.764898, 509.901951, 92.618117, 97.631738),
    ("urban", 100, 0, 0.999975, 100, 78.468383, 79.468857),
    ("urban", 100, 100, 0.967692, 141.421356, 81.478683, 83.092537),
    ("urban", 100, 500, 0.120171, 509.901951, 92.618117, 110.334874),
    ("urban", 300, 500, 0.760204, 583.095189, 93.783172, 99.339301),
    ("dense_urban", 100, 100, 0.755774, 141.421356, 81.478683, 88.305118),
    ("high_rise", 100, 100, 0.132077, 141.421356, 81.478683, 111.291847),
]


def link(scene: str, h: float, r: float, f: float) -> tuple[float, float, float, float]:
    """Probability of a line of sight, distance, loss in free space, loss."""
    a, b, in_sight, out_of_sight = SCENES[scene]
    angle = math.degrees(math.atan2(h, r))
    p = 1 / (1 + a * math.exp(-b * (angle - a)))
    d = math.hypot(h, r)
    free = 20 * math.log10(4 * math.pi * f * d / LIGHT)
    return p, d, free, free + p * in_sight + (1 - p) * out_of_sight


def flight_power(v: float) -> float:
    rho, s, area, tip, v0 = 1.225, 0.05, 0.503, 120, 4.03
    p0 = 0.012 / 8 * rho * s * area * 300**3 * 0.4**3
    pi = 1.1 * 20**1.5 / math.sqrt(2 * rho * area)
    induced = math.sqrt(math.sqrt(1 + v**4 / (4 * v0**4)) - v**2 / (2 * v0**2))
    return p0 * (1 + 3 * v**2 / tip**2) + pi * induced + 0.5 * 0.6 * rho * s * area * v**3


def step(case: dict[str, Any]) -> dict[str, Any]:
    """Rates, rewards and the rest after one step, for commands given as velocities and choices."""
    field = case["fields"]
    dt, side, band = field["time_step"], field["area"], field["bandwidth"]
    noise = 10 ** (field["noise_density"] / 10 - 3) * band
    n, k = len(case["vehicles"]), len(case["users"])
    power, channel = case["power"], case["channel"]
    after, outside = [], []
    for (x, y, h), (u, v, w) in zip(case["vehicles"], case["velocity"], strict=True):
        new = (x + u * dt, y + v * dt)
        held = tuple(min(max(c, 0), side) for c in new)
        low, high = field["heights"]
        after.append([*held, min(max(h + w * dt, low), high)])
        outside.append(held != new)
    gain = np.zeros((n, k))
    loss = np.zeros((n, k))
    for i in range(n):
        for j, (x, y) in enumerate(case["users"]):
            r = math.hypot(after[i][0] - x, after[i][1] - y)
            loss[i, j] = link(field["scene"], after[i][2], r, field["carrier"])[3]
            gain[i, j] = 10 ** (-loss[i, j] / 10)
    serving = [max(range(n), key=lambda i: power[i] * gain[i, j]) for j in range(k)]
    sinr, share = np.zeros(k), np.zeros(k)
    for j, i in enumerate(serving):
        others = [m for m in range(n) if m != i and channel[m] == channel[i]]
        sinr[j] = power[i] * gain[i, j] / (sum(power[m] * gain[m, j] for m in others) + noise)
    efficiency = np.log2(1 + sinr)
    logits = [
        3 * case["preference"][i][j] - case["tilt"][i] * math.log(efficiency[j])
        for j, i in enumerate(serving)
    ]
    for j, i in enumerate(serving):
        total = sum(math.exp(logits[m]) for m in range(k) if serving[m] == i)
        share[j] = math.exp(logits[j]) / total
    rates = share * band * efficiency
    peak_loss = link(field["scene"], field["heights"][0], 0, field["carrier"])[3]
    peak = band * math.log2(1 + field["max_power"] * 10 ** (-peak_loss / 10) / noise)
    energy, crash, rewards = [], [], []
    for i in range(n):
        moved = [(b - a) / dt for a, b in zip(case["vehicles"][i], after[i], strict=True)]
        watts = flight_power(math.hypot(moved[0], moved[1])) + 20 * max(moved[2], 0)
        energy.append(watts * dt)
        gaps = [closest(case["vehicles"][i], after[i], case["vehicles"][m], after[m])
                for m in range(n) if m != i]  # fmt: skip
        crash.append(min(gaps) < field["safe_distance"])
        mine = [rates[j] for j in range(k) if serving[j] == i]
        counted = mine if field["fairness"] == "served" else rates
        spread = float(np.std(counted)) if len(counted) else 0.0
        rewards.append(
            field["rate_weight"] * (np.mean(mine) if mine else 0) / peak
            - field["fairness_weight"] * spread / peak
            - field["energy_weight"] * watts / flight_power(0)
            - field["collision_weight"] * crash[i] - field["boundary_weight"] * outside[i]
        )  # fmt: skip
    return {
        "vehicles": after, "outside": outside, "collision": crash, "energy": energy,
        "loss": loss.tolist(), "serving": serving, "sinr": (10 * np.log10(sinr)).tolist(),
        "rates": rates.tolist(), "peak_rate": peak, "rewards": rewards,
        "jain": float(rates.sum() ** 2 / (k * (rates**2).sum())),
        "rate": [float(sum(r for r, s in zip(rates, serving, strict=True) if s == i))
                 for i in range(n)],
    }  # fmt: skip


def closest(a0: list[float], a1: list[float], b0: list[float], b1: list[float]) -> float:
    """Smallest distance of two straight flights, by trying many moments."""
    t = np.linspace(0, 1, 20_001)[:, None]
    first, second = (np.array(x) + t * (np.array(y) - np.array(x)) for x, y in ((a0, a1), (b0, b1)))
    return float(np.linalg.norm(first - second, axis=1).min())


def sheet_step() -> dict[str, Any]:
    """The step of section 8.12."""
    case = {
        "fields": {
            "scene": "urban", "carrier": 2e9, "heights": [100.0, 100.0], "bandwidth": 1e6,
            "noise_density": -174.0, "time_step": 1.0, "area": 500.0, "max_speed": 20.0,
            "max_power": 0.1, "safe_distance": 10.0, "fairness": "all", "rate_weight": 1.0,
            "fairness_weight": 0.1, "energy_weight": 0.0, "collision_weight": 1.0,
            "boundary_weight": 1.0, "power_control": False, "reward": "individual",
        },
        "vehicles": [[100.0, 100.0, 100.0], [400.0, 300.0, 100.0]],
        "users": [[150.0, 100.0], [300.0, 300.0], [420.0, 260.0], [90.0, 160.0]],
        "actions": [[1.0, 0.0], [-0.6, 0.8]],
        "velocity": [[20.0, 0.0, 0.0], [-12.0, 16.0, 0.0]],
        "power": [0.1, 0.1], "channel": [0, 0], "tilt": [0.0, 0.0], "preference": [[0] * 4] * 2,
    }  # fmt: skip
    case["after"] = found = step(case)
    mega = np.array(found["rates"]) / 1e6
    np.testing.assert_allclose(
        found["loss"],
        [[79.8494972, 100.6250819, 104.9857176, 81.1880934],
         [104.0310644, 82.3944168, 81.0689653, 104.8074787]], atol=6e-8,
    )  # fmt: skip
    np.testing.assert_allclose(found["sinr"], [24.1771953, 18.2286690, 23.9113063, 23.6141581])
    np.testing.assert_allclose(mega, [4.0184968858, 3.0384818448, 3.9745070467, 3.9253584970])
    np.testing.assert_allclose(np.array(found["rate"]) / 1e6, [7.9438553828, 7.0129888915])
    np.testing.assert_allclose([mega[[0, 3]].std(), mega[1:3].std()], [0.0465691944, 0.4680126010])
    np.testing.assert_allclose([mega.std(), found["jain"]], [0.4059054925, 0.9883533206])
    np.testing.assert_allclose(found["energy"], 178.2958214836)
    return case


def rich_step() -> dict[str, Any]:
    """Channels, climbs, shares of users, a collision and the edge, all at once."""
    rng = np.random.default_rng(0)
    actions = [
        # velocity, climb, power, logits of two channels, preferences of six users
        [0.5, 0.5, 0.4, 0.2, 0.9, 0.1, *rng.uniform(-1, 1, 6).round(3).tolist()],
        [-0.5, 0.3, -1.0, 0.6, 0.3, 0.2, *rng.uniform(-1, 1, 6).round(3).tolist()],
        [1.0, -1.0, 0.0, -0.5, 0.1, 0.4, *rng.uniform(-1, 1, 6).round(3).tolist()],
        [-1.3, 0.0, 0.0, 1.0, 0.8, -0.4, *rng.uniform(-1, 1, 6).round(3).tolist()],
    ]
    velocity = []
    for action in actions:
        u, v = np.clip(action[:2], -1, 1) * 15.0
        shrink = min(1.0, 15.0 / math.hypot(u, v))
        velocity.append([float(u * shrink), float(v * shrink), 3.0 * action[2]])
    case = {
        "fields": {
            "scene": "dense_urban", "carrier": 2.4e9, "heights": [60.0, 140.0], "bandwidth": 180e3,
            "noise_density": -170.0, "time_step": 4.0, "area": 800.0, "max_speed": 15.0,
            "max_climb": 3.0, "max_power": 0.02, "num_channels": 2, "bandwidth_split": "per_user",
            "safe_distance": 25.0, "fairness": "served", "rate_weight": 2.0,
            "fairness_weight": 0.5, "energy_weight": 0.2, "collision_weight": 3.0,
            "boundary_weight": 1.5, "power_control": True, "reward": "individual",
        },
        "vehicles": [[300.0, 310.0, 80.0], [340.0, 300.0, 85.0], [700.0, 400.0, 100.0],
                     [20.0, 790.0, 120.0]],
        "users": [[310.0, 280.0], [500.0, 420.0], [720.0, 380.0], [650.0, 500.0], [350.0, 700.0],
                  [420.0, 330.0]],
        "actions": actions,
        "velocity": velocity,
        "power": [0.01 * (action[3] + 1) for action in actions],
        "channel": [int(action[5] > action[4]) for action in actions],
        "tilt": [0.0] * 4,
        "preference": [action[6:] for action in actions],
    }  # fmt: skip
    case["after"] = found = step(case)
    assert any(found["collision"])
    assert not all(found["collision"])
    assert found["outside"] == [False, False, False, True]
    assert len(set(found["serving"])) > 2
    return case


def main() -> None:
    losses = []
    for scene, h, r, *numbers in LOSSES:
        found = link(scene, h, r, 2e9)
        np.testing.assert_allclose(found, numbers, atol=6e-7)
        losses.append({"scene": scene, "height": h, "distance": r, "in_sight": found[0],
                       "free_space": found[2], "loss": found[3]})  # fmt: skip
    speeds = [0.0, 5.0, 10.0, 20.0, 30.0]
    power = [flight_power(v) for v in speeds]
    sheet = [168.48421774, 143.60830405, 126.02906867, 178.29582148, 356.28395644]
    np.testing.assert_allclose(power, sheet, atol=6e-9)
    golden = {
        "origin": "Fact sheet on multi-vehicle networks, section 8, and the same formulas in plain "
        "NumPy loops in float64; see make_uav.py",
        "losses": losses,
        "link": {
            "scene": "dense_urban", "carrier": 2.4e9, "power": 0.01, "bandwidth": 180e3,
            "noise_density": -170.0, "height": 100.0, "distances": [100.0, 300.0],
            "losses": [89.88874266, 109.99682305], "alone": [37.558532, 2.245846942],
            "disturbed": [20.030659, 1.200293211],
        },
        "energy": {
            "speeds": speeds, "power": power, "blade": 79.85628, "induced": 88.62793774,
            "least_power": [10.2125, 126.0027], "least_per_metre": [18.295, 8.82873],
        },
        "fairness": {"rates": [1.0, 2.0, 3.0, 0.0], "jain": 0.6428571429, "std": 1.1180339887},
        "steps": {"sheet": sheet_step(), "rich": rich_step()},
    }  # fmt: skip
    path = Path(__file__).parent / "uav.json"
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
