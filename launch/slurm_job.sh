#!/usr/bin/env bash
# The job that launch/slurm.sh submits: the run, one process a GPU, and once more when its time is
# nearly over (Slurm then sends USR1 to this script).
#
#   sbatch [FLAGS] launch/slurm_job.sh ARGUMENTS of jax_distill.main
set -euo pipefail

if [[ ${1-} == --help ]]; then
  echo "slurm_job.sh is submitted by launch/slurm.sh run, in the folder of the checkout; see there."
  exit
fi
[[ -n ${SLURM_JOB_ID-} ]] || {
  echo "error: this is not a Slurm job; submit it with launch/slurm.sh run" >&2
  exit 1
}

told=""
# shellcheck disable=SC2329 # the trap calls it
save() {
  told=yes
  scancel --signal=TERM "$SLURM_JOB_ID" # to the processes, not to this script
}
trap save USR1

# A process that has saved ends with 143; the others must not be killed while they save.
srun --kill-on-bad-exit=0 launch/train.sh "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended `wait`, the run is still saving
  code=0
  wait "$step" || code=$?
done
if [[ -n $told ]] && ((code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
