#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the virtual environment that the Makefile's targets work in: torch and what the build needs.
#
#   tools/setup_env.sh VENV
#
# PYTHON      interpreter to make it from (python3, 3.10 or newer)
# TORCH_SPEC  what to install if no torch >= 2.11 is there; default: the newest on a machine with
#             an NVIDIA driver, else a CPU build of 2.13.0
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?VENV}
python=${PYTHON:-python3}
good_torch='import torch
major, minor = torch.__version__.split(".")[:2]
assert (int(major), int(minor)) >= (2, 11)'

say() { printf '== %s\n' "$*"; }

if ! "$python" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null; then
  echo "seer_cuda needs Python 3.10 or newer; '$python' is not. Set PYTHON=/path/to/python." >&2
  exit 1
fi
if [ ! -x "$venv/bin/python" ]; then
  # A machine that already has a fitting torch (a CUDA container, say) keeps using it.
  share=
  "$python" -c "$good_torch" 2>/dev/null && share=--system-site-packages
  say "virtual environment $venv ${share:+(with the torch of $python)}"
  "$python" -m venv $share "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! "$venv/bin/python" -c "$good_torch" 2>/dev/null; then
  extra=()
  if [ -z "${TORCH_SPEC:-}" ]; then
    if command -v nvidia-smi > /dev/null; then
      TORCH_SPEC='torch>=2.11'
    else
      TORCH_SPEC='torch==2.13.0'
      # torch's own index has builds without 2 GB of CUDA libraries; asked only if it answers.
      index=https://download.pytorch.org/whl/cpu
      probe="import urllib.request as u; u.urlopen('$index/torch/', timeout=5)"
      "$venv/bin/python" -c "$probe" 2>/dev/null && extra=(--extra-index-url "$index")
    fi
  fi
  say "installing $TORCH_SPEC"
  pip install --quiet ${extra[@]+"${extra[@]}"} "$TORCH_SPEC"
fi

say "installing what the build needs"
"$venv/bin/python" tools/build_requirements.py > "$venv/build-requirements.txt"
pip install --quiet -r "$venv/build-requirements.txt"
"$venv/bin/python" tools/build_requirements.py --compiler > "$venv/compiler-requirements.txt"
pip install --quiet -r "$venv/compiler-requirements.txt"
