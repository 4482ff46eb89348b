"""Puzzles and their solutions by reasoning-gym's solver, for knights.json.

PYTHONPATH=FOLDER python tests/golden/make_knights.py, where reasoning-gym 0.1.25 is in FOLDER

Its sampler draws statements, many of which make puzzles with no or several solutions. Each row has
the statements as its nested tuples, the number of solutions, and the first one.
"""

import json
from pathlib import Path
from typing import Any

from reasoning_gym.logic.knights_knaves import KKProblemSampler, KnightsKnavesDataset

VERSION = "0.1.25"


def plain(statement: Any) -> Any:
    """A statement with Python's integers and lists, as JSON has them."""
    if isinstance(statement, (tuple, list)):
        return [plain(part) for part in statement]
    return statement if isinstance(statement, str) else int(statement)


def main() -> None:
    rows = []
    for people in range(2, 9):
        sampler = KKProblemSampler(rand_seed=people, n_people=people)
        for _ in range(30):
            statements = sampler.sample()
            found = KnightsKnavesDataset.find_solution(statements)
            first = [bool(role) for role in found[0]] if found else None
            rows.append([plain(statements), len(found), first])
    text = {
        "origin": "tests/golden/make_knights.py: reasoning-gym's sampler and solver.",
        "versions": {"reasoning-gym": VERSION},
        "puzzles": rows,
    }
    Path(__file__).with_name("knights.json").write_text(json.dumps(text) + "\n")


if __name__ == "__main__":
    main()
