#!/usr/bin/env bash
# What every launcher starts on every host: jax_distill.main with the arguments that are given.
#
#   launch/train.sh --config=configs/scm.py --workdir=/mnt/jax_distill/scm
#
# Takes the Python of .venv beside setup.py, or python3. Exits with 0 when the run has taken all its
# steps, with 143 when it was told to stop (SIGTERM) and has saved, so that no scheduler takes it for
# finished: the same command continues it. Other codes are those of the run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=common.sh
source launch/common.sh

[[ ${1-} != --help ]] || { help_of launch/train.sh && exit; }
check_training "$@"
python=.venv/bin/python
[[ -x $python ]] || python=python3

child=""
told=""
# shellcheck disable=SC2329 # the trap calls it
stop() {
  told=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM
"$python" -m jax_distill.main "$@" &
child=$!
[[ -z $told ]] || kill -TERM "$child"
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # the signal ended `wait`, the run is still saving
  code=0
  wait "$child" || code=$?
done

# One host is told to stop and all do: the others ask the files whether the run is finished.
finished='
import json, pathlib, sys
workdir, bucket = pathlib.Path(sys.argv[1]), sys.argv[1].startswith("gs://")
if bucket:
    from jax_distill.storage import paths
    workdir = paths.path(sys.argv[1])
total = json.loads((workdir / "config.json").read_text())["total_steps"]
whole = lambda path: not bucket or (path / "commit_success.txt").exists()
found = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
steps = [int(path.name) for path in found if whole(path)]
sys.exit(max(steps, default=0) < total)'
if [[ -n $told ]] || { ((code == 0)) && ! "$python" -c "$finished" "$workdir"; }; then
  code=143
fi
exit "$code"
