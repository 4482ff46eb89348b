#!/usr/bin/env bash
# Makes FOLDER/NAME, a virtual environment with pinned versions of a peer: rejax, purejaxrl, brax,
# jaxmarl or torch, which has TRL and verl.
# Usage: bash benchmarks/peers/build.sh NAME FOLDER
#
# rejax 0.1.3 and purejaxrl call gymnax's old step of five values, which 0.0.9 has. purejaxrl is on no
# package index: purejaxrl_ppo.py says where it comes from. brax.training's PPO calls what JAX
# removed after 0.6. JaxMARL's scripts are in no package either: jaxmarl_mappo.py. The requirements
# of verl exclude the transformers that TRL has; its losses need only what is listed here.
set -euo pipefail
without_requirements=()
name=${1:?"NAME is missing: rejax, purejaxrl, brax, jaxmarl or torch"}
folder=${2:?"FOLDER is missing"}
case $name in
  rejax)
    packages=(rejax==0.1.3 gymnax==0.0.9 jax==0.10.2 flax==0.12.8 optax==0.2.8 distrax==0.1.9) ;;
  purejaxrl) # its wrappers import brax
    packages=(gymnax==0.0.9 brax==0.14.2 jax==0.10.2 flax==0.12.8 optax==0.2.8 distrax==0.1.9) ;;
  brax)
    packages=(brax==0.14.2 jax==0.6.2 flax==0.11.2 optax==0.2.8) ;;
  jaxmarl) # its distrax calls what released versions of TensorFlow Probability do not have
    packages=(jaxmarl==0.2.0 jax==0.10.2 flax==0.12.8 optax==0.2.8 distrax==0.1.9
      tfp-nightly==0.26.0.dev20261027 hydra-core==1.3.8 omegaconf==2.3.1) ;;
  torch)
    packages=(torch==2.13.0 trl==1.16.0 transformers==5.24.0 tensordict==0.15.3 ray==2.60.0
      hydra-core==1.3.8 codetiming==1.4.0 pandas==3.1.1)
    without_requirements=(verl==0.9.1) ;;
  *)
    echo "NAME must be rejax, purejaxrl, brax, jaxmarl or torch, got $name" >&2
    exit 2 ;;
esac
mkdir -p "$folder"
"${PYTHON:-python3}" -m venv "$folder/$name"
"$folder/$name/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
if ((${#without_requirements[@]})); then
  "$folder/$name/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    "${without_requirements[@]}"
fi
