"""What `import trustjax` brings with it."""

import json
import subprocess
import sys

HEAVY = {"hydra", "orbax", "datasets", "grain", "sklearn", "brax", "gymnax", "torch", "experiments"}
SCRIPT = """
import json, sys
import flax, jax, optax
before = set(sys.modules)
import trustjax
print(json.dumps([sorted(sys.modules), sorted(set(sys.modules) - before)]))
"""


def test_import_is_light():
    """JAX, Flax and Optax do the work; extras are imported where they are used."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    loaded, added = json.loads(result.stdout)
    packages = {name.partition(".")[0] for name in loaded}
    assert "trustjax" in packages
    assert not packages & HEAVY
    assert {name.partition(".")[0] for name in added} <= {"trustjax", "jax", "flax", "optax"}
    # Of trustjax itself, what needs an extra waits as well.
    assert not {"trustjax.data", "trustjax.envs", "trustjax.agents"} & set(loaded)
