"""A process that runs a peer's programs when it is told to, so that ours and its own take turns."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class PeerProcess:
    """A script of benchmarks/peers in an environment of its own.

    The script writes a line of JSON about itself. Then it reads the name of a program per line,
    runs it once, and writes the seconds.

    Attributes:
      about: What the script says of itself.
    """

    def __init__(self, python: Path, script: str, arguments: Sequence[object]) -> None:
        path = Path(__file__).parent / "peers" / script
        self._process = subprocess.Popen(
            [str(python), str(path), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about: dict[str, Any] = json.loads(self._answer())

    def run(self, name: str) -> float:
        """Runs a program once, and returns the seconds that it took there."""
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peer ended; its error stands above")
        return line
