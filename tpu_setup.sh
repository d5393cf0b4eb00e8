#!/usr/bin/env bash
# Sets up a Cloud TPU VM: Python, a virtual environment, jax_distill for TPU, and a look at the chips.
# Run it on every host of the slice, from anywhere; it can be run again.
#
#   ./tpu_setup.sh [VENV]        VENV defaults to .venv beside this script
#
# All hosts of a slice at once:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='jax_distill/tpu_setup.sh'
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${1:-$root/.venv}

python=""
for candidate in python3.13 python3.12 python3.11 python3; do
  if command -v "$candidate" >/dev/null &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python=$candidate
    break
  fi
done
if [[ -z $python ]]; then
  echo "error: Python 3.11 or newer is missing; install it, such as with: sudo apt-get install -y python3.11 python3.11-venv" >&2
  exit 1
fi
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  echo "error: $python cannot make virtual environments; install its venv module, such as with: sudo apt-get install -y $python-venv" >&2
  exit 1
fi

[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --upgrade pip
"$venv/bin/pip" install --quiet --editable "$root[tpu]"

# Every host of a slice sees its own chips here; a training run joins them into one mesh.
if ! TPU_PROCESS_BOUNDS=1,1,1 TPU_VISIBLE_CHIPS=0 timeout 120 "$venv/bin/python" -c '
import jax
print("jax", jax.__version__, "sees a", jax.devices()[0].device_kind)
assert jax.default_backend() == "tpu"
'; then
  echo "warning: no TPU answers on this host: is it a TPU VM, and is no other process using the chip?" >&2
fi
echo "ready: $venv/bin/python -m jax_distill.main --config=configs/scm.py"
