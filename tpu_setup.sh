#!/usr/bin/env bash
# Makes a bare Cloud TPU VM ready: Python, a virtual environment, jax_distill, a look at the chips.
# Run it on every host of the slice, from anywhere; it can be run again.
#
#   ./tpu_setup.sh [--venv=FOLDER] [--extra=EXTRA] [--dry_run]
#
#   --venv    the virtual environment, .venv beside this script by default
#   --extra   what jax_distill is installed for: tpu (default), cuda, cuda12, or none
#
# Where the system has no Python from 3.11 on that can make virtual environments, uv (from PyPI)
# brings one. All hosts of a slice at once: launch/tpu_vm.sh copy.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

venv=$root/.venv
extra=tpu
for argument in "$@"; do
  case $argument in
    --help) help_of "${BASH_SOURCE[0]}" && exit ;;
    --dry_run) dry_run=yes ;;
    --venv=* | --venv) venv=$(value_of "$argument") ;;
    --extra=* | --extra) extra=$(value_of "$argument") ;;
    *) die "unknown option $argument; see tpu_setup.sh --help" ;;
  esac
done
[[ $extra =~ ^(tpu|cuda|cuda12|none)$ ]] || die "unknown --extra=$extra; use tpu, cuda, cuda12, none"

fits() { # PYTHON: new enough, and able to make virtual environments
  "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! [[ -x $venv/bin/python ]]; then
  python=""
  for candidate in python3.13 python3.12 python3.11 python3; do
    if fits "$candidate"; then
      python=$candidate
      break
    fi
  done
  if [[ -n $python ]]; then
    run "$python" -m venv "$venv"
  else
    command -v python3 >/dev/null || die "python3 is missing; install Python 3.11 or newer"
    run python3 -m pip install --quiet --upgrade --target "$venv.uv" uv
    run "$venv.uv/bin/uv" venv --quiet --seed --python 3.12 "$venv"
  fi
fi
run "$venv/bin/python" -m pip install --quiet --upgrade pip
wanted=$root
[[ $extra == none ]] || wanted="${root}[$extra]"
run "$venv/bin/python" -m pip install --quiet --editable "$wanted"

# Each host sees its own chips here; a training run joins them into one mesh.
look='
import jax
assert jax.default_backend() == "tpu"
print("jax", jax.__version__, "sees a", jax.devices()[0].device_kind)'
if [[ $extra == tpu ]]; then
  run env TPU_PROCESS_BOUNDS=1,1,1 TPU_VISIBLE_CHIPS=0 timeout 120 "$venv/bin/python" -c "$look" ||
    echo "warning: no TPU answers on this host: is it a TPU VM, and does no other process hold it?" >&2
fi
[[ -n $dry_run ]] || echo "ready: $venv/bin/python -m jax_distill.main --config=configs/scm.py"
