"""Hydra-configured experiments: `python -m experiments.run +exp=NAME`."""
