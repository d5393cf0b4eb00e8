#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster, without containers: a virtual environment with JAX's own CUDA in
# this checkout, which lies on a file system that all nodes share, as do the runs.
#
#   launch/slurm.sh COMMAND [OPTIONS] [-- ARGUMENTS of jax_distill.main]
#
# setup    Makes .venv and installs jax_distill for CUDA; on the login node, once.
#            --cuda=13|12         13 by default (drivers from 580 on); 12 for drivers from 525 on
# run      Submits a job, one process a GPU. Before its time is over it saves and queues again.
#            --name=NAME          of the job
#            --nodes=N            1 by default
#            --gpus=N             a node, 8 by default
#            --time=TIME          as sbatch's; the partition's limit by default
#            --sbatch=FLAG        any other flag of sbatch, such as --sbatch=--partition=h200
# logs     Follows the log of the last job of --name.
# stop     Tells the jobs of --name to save and end.
#
# All take --dry_run, which prints the commands and runs none.
#
#   launch/slurm.sh run --name=scm --nodes=2 --gpus=8 --time=24:00:00 -- \
#     --config=configs/scm.py:flux_lite --workdir=/shared/runs/scm \
#     --config.teacher.checkpoint=/shared/flux_lite --config.data.path=/shared/latents
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"

[[ $# -gt 0 ]] || die "which command? see launch/slurm.sh --help"
command=$1
shift
[[ $command != --help ]] || { help_of "${BASH_SOURCE[0]}" && exit; }
name="" nodes=1 gpus=8 cuda=13
options=()
training=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) help_of "${BASH_SOURCE[0]}" && exit ;;
    --dry_run) dry_run=yes ;;
    --cuda=* | --cuda) cuda=$(value_of "$1") ;;
    --name=* | --name) name=$(value_of "$1") ;;
    --nodes=* | --nodes) nodes=$(value_of "$1") ;;
    --gpus=* | --gpus) gpus=$(value_of "$1") ;;
    --time=* | --time) options+=(--time="$(value_of "$1")") ;;
    --sbatch=* | --sbatch) options+=("$(value_of "$1")") ;;
    --)
      shift
      training=("$@")
      break
      ;;
    *) die "unknown option $1; arguments of jax_distill.main come after --" ;;
  esac
  shift
done
for count in "nodes $nodes" "gpus $gpus"; do
  [[ ${count#* } =~ ^[1-9][0-9]*$ ]] || die "--${count% *}=${count#* } is not a positive number"
done
case $command in
  run | logs | stop) [[ -n $name ]] || die "--name is missing; name the job, such as --name=scm" ;;
esac

submit() {
  [[ ${#training[@]} -gt 0 ]] || die "nothing to run; put -- and the arguments of jax_distill.main last"
  check_training "${training[@]}"
  [[ -n $dry_run || -x $root/.venv/bin/python ]] || die "$root/.venv is missing; make it with" \
    "launch/slurm.sh setup"
  run mkdir -p "$root/runs/slurm"
  run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
    --requeue --signal=B:USR1@300 --chdir="$root" --output="$root/runs/slurm/%x-%j.log" \
    --open-mode=append ${options[@]+"${options[@]}"} "$root/launch/slurm_job.sh" "${training[@]}"
}

follow() {
  local log logs=("$root/runs/slurm/$name"-*.log)
  log=${logs[0]}
  for other in "${logs[@]}"; do
    [[ ! $other -nt $log ]] || log=$other
  done
  [[ -n $dry_run || -e $log ]] || die "no job of --name=$name has written a log yet"
  run tail -n 100 -F "$log"
}

case $command in
  setup)
    [[ $cuda == 12 || $cuda == 13 ]] || die "--cuda=$cuda is neither 12 nor 13"
    extra=cuda
    [[ $cuda == 13 ]] || extra=cuda12
    run "$root/tpu_setup.sh" --extra="$extra"
    ;;
  run) submit ;;
  logs) follow ;;
  stop) run scancel --name="$name" --user="$(id -un)" --signal=TERM ;;
  *) die "unknown command '$command'; see launch/slurm.sh --help" ;;
esac
