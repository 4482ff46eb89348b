#!/usr/bin/env bash
# Makes FOLDER/NAME, a virtual environment with pinned versions of a peer: rejax, purejaxrl or brax.
# Usage: bash benchmarks/peers/build.sh NAME FOLDER
#
# rejax 0.1.3 and purejaxrl call gymnax's old step of five values, which 0.0.9 has. purejaxrl is on no
# package index: purejaxrl_ppo.py says where it comes from. brax.training's PPO calls what JAX
# removed after 0.6.
set -euo pipefail
name=${1:?"NAME is missing: rejax, purejaxrl or brax"}
folder=${2:?"FOLDER is missing"}
case $name in
  rejax)
    packages=(rejax==0.1.3 gymnax==0.0.9 jax==0.10.2 flax==0.12.8 optax==0.2.8 distrax==0.1.9) ;;
  purejaxrl) # its wrappers import brax
    packages=(gymnax==0.0.9 brax==0.14.2 jax==0.10.2 flax==0.12.8 optax==0.2.8 distrax==0.1.9) ;;
  brax)
    packages=(brax==0.14.2 jax==0.6.2 flax==0.11.2 optax==0.2.8) ;;
  *)
    echo "NAME must be rejax, purejaxrl or brax, got $name" >&2
    exit 2 ;;
esac
mkdir -p "$folder"
"${PYTHON:-python3}" -m venv "$folder/$name"
"$folder/$name/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
