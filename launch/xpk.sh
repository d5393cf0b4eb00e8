#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster through xpk (pip install xpk, 1.16 or newer), as a JobSet that is
# started again when hosts are taken away.
#
#   launch/xpk.sh COMMAND --cluster=CLUSTER [OPTIONS] [-- ARGUMENTS of jax_distill.main]
#
# run      Submits a workload: this checkout on an image of Python, installed when it starts.
#            --name=NAME          of the workload
#            --type=TYPE          such as v5litepod-64, v5p-64, v6e-64
#            --slices=N           1 by default
#            --storage=STORAGE    of `xpk storage attach` (Filestore, or a bucket through gcsfuse),
#                                 where the workdir is; may be given again
#            --spot, --reservation=NAME, --on_demand   for clusters that make nodes as needed
#            --restarts=N         20 by default
#            --image=IMAGE        python:3.12 by default
# logs     Follows the logs of the first host of --name.
# list     Lists the workloads.
# delete   Deletes the workload --name; xpk asks first.
#
# All take --project=PROJECT, --zone=ZONE, and --dry_run, which prints the commands and runs none.
#
#   launch/xpk.sh run --cluster=CLUSTER --name=scm --type=v6e-64 --storage=shared -- \
#     --config=configs/scm.py:flux_lite --workdir=/shared/scm \
#     --config.teacher.checkpoint=/shared/flux_lite --config.data.path=/shared/latents
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"

[[ $# -gt 0 ]] || die "which command? see launch/xpk.sh --help"
command=$1
shift
[[ $command != --help ]] || { help_of "${BASH_SOURCE[0]}" && exit; }
cluster="" name="" type="" slices=1 restarts=20 image=python:3.12
place=()
options=()
training=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) help_of "${BASH_SOURCE[0]}" && exit ;;
    --dry_run) dry_run=yes ;;
    --cluster=* | --cluster) cluster=$(value_of "$1") ;;
    --project=* | --project) place+=(--project="$(value_of "$1")") ;;
    --zone=* | --zone) place+=(--zone="$(value_of "$1")") ;;
    --name=* | --name) name=$(value_of "$1") ;;
    --type=* | --type) type=$(value_of "$1") ;;
    --slices=* | --slices) slices=$(value_of "$1") ;;
    --storage=* | --storage) options+=(--storage="$(value_of "$1")") ;;
    --spot) options+=(--spot) ;;
    --on_demand) options+=(--on-demand) ;;
    --reservation=* | --reservation) options+=(--reservation="$(value_of "$1")") ;;
    --restarts=* | --restarts) restarts=$(value_of "$1") ;;
    --image=* | --image) image=$(value_of "$1") ;;
    --)
      shift
      training=("$@")
      break
      ;;
    *) die "unknown option $1; arguments of jax_distill.main come after --" ;;
  esac
  shift
done
[[ -n $cluster ]] || die "--cluster is missing; name the cluster of xpk"
place=(--cluster="$cluster" ${place[@]+"${place[@]}"})
case $command in
  run | logs | delete) [[ -n $name ]] || die "--name is missing; name the workload, such as --name=scm" ;;
esac

submit() {
  [[ -n $type ]] || die "--type is missing; such as --type=v6e-64"
  [[ ${#training[@]} -gt 0 ]] || die "nothing to run; put -- and the arguments of jax_distill.main last"
  check_training "${training[@]}"
  local train
  train=$(quoted launch/train.sh "${training[@]}")
  # `exec`: xpk passes SIGTERM on to this process alone. Its 143 is a code that xpk starts again.
  run xpk workload create --workload="$name" "${place[@]}" --tpu-type="$type" \
    --num-slices="$slices" --max-restarts="$restarts" --termination-grace-period-seconds=300 \
    --base-docker-image="$image" --script-dir="$root" ${options[@]+"${options[@]}"} \
    --command="python3 -m pip install --quiet --editable '.[tpu]' && exec $train"
}

case $command in
  run) submit ;;
  logs)
    run kubectl logs --follow --tail=100 \
      --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    ;;
  list) run xpk workload list "${place[@]}" ;;
  delete) run xpk workload delete --workload="$name" "${place[@]}" ;;
  *) die "unknown command '$command'; see launch/xpk.sh --help" ;;
esac
