#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from a machine that has gcloud.
#
#   launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS of jax_distill.main]
#
# create   Makes the slice, and waits until it is there.
#            --type=TYPE         such as v5litepod-64, v5p-64, v6e-64
#            --runtime=VERSION   the software of its hosts; known for v2 to v6e
#            --queued            waits in the queue of queued resources
#            --spot              cheaper, and may be taken away at any time
# copy     Copies this checkout to all hosts, without .git, .venv and runs, and sets them up.
# mount    Mounts, as /mnt/jax_distill on all hosts, what they share; one of
#            --bucket=BUCKET     of Cloud Storage; made with --enable-hierarchical-namespace
#            --nfs=HOST:/SHARE   such as Filestore's
# run      Starts training on all hosts, which outlives the connection. The workdir is a folder under
#          /mnt/jax_distill.
# logs     Follows the log of a host, --worker=N, the first by default.
# status   Says whether the slice is there and how the run stands.
# stop     Tells the run to save and end; end a watch first, or it starts the run again.
# delete   Deletes the slice; with --queued, its queued resource too. gcloud asks first.
# up       All that is needed of create, and then copy, mount and run.
# watch    up; looks every --every=SECONDS (60), and does it again when the slice was taken away: the
#          run continues from its last checkpoint. Ends with the run, or after three failures in a
#          row. With --queued it waits for its turn; without, it fails where there is no room.
#
# All take --project=PROJECT, and --dry_run, which prints the commands and runs none.
#
#   launch/tpu_vm.sh watch --name=scm --zone=us-east5-a --type=v6e-64 --queued --spot \
#     --bucket=BUCKET -- --config=configs/scm.py:flux_lite --workdir=/mnt/jax_distill/scm \
#     --config.teacher.checkpoint=/mnt/jax_distill/flux_lite --config.data.path=/mnt/jax_distill/data
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"

mount_point=/mnt/jax_distill
alive="kill -0 \"\$(cat jax_distill_run/pid 2>/dev/null)\" 2>/dev/null" # in the remote shell

tpus() { # GROUP VERB [ARGUMENTS]: one command of gcloud, on the slice
  run gcloud compute tpus "$1" "$2" "$name" "${place[@]}" "${@:3}"
}

on_all() { # COMMAND of the remote shell
  tpus tpu-vm ssh --worker=all --command="$1"
}

state() { # of the queued resource, or of the node; nothing where there is none
  if [[ -n $queued ]]; then
    tpus queued-resources describe --format="value(state.state)" 2>/dev/null || true
  else
    tpus tpu-vm describe --format="value(state)" 2>/dev/null || true
  fi
}

runtime_of() { # TYPE: https://cloud.google.com/tpu/docs/runtimes
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) die "--type=$1: unknown type, so its software is unknown too; give --runtime=VERSION" ;;
  esac
}

create() {
  local options=(--accelerator-type="$type")
  [[ -z $spot ]] || options+=(--spot)
  if [[ -z $queued ]]; then
    tpus tpu-vm create --version="$runtime" "${options[@]}"
    return
  fi
  tpus queued-resources create --node-id="$name" --runtime-version="$runtime" "${options[@]}"
  local now last=""
  while true; do
    now=$(state)
    if [[ -n $dry_run ]]; then
      printf '%s\n' "$now"
      return
    fi
    [[ $now == "$last" ]] || echo "$name: ${now:-not in the queue}" >&2
    last=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | "") die "the queue gives no $type ($now); see gcloud" \
        "compute tpus queued-resources describe, then delete it and try again" ;;
    esac
    sleep "$every"
  done
}

copy() {
  local archive=jax_distill.tar.gz
  local folder=FOLDER
  if [[ -z $dry_run ]]; then
    folder=$(mktemp -d)
    # shellcheck disable=SC2064 # the folder's name now
    trap "rm -rf $(quoted "$folder")" EXIT
  fi
  run tar -czf "$folder/$archive" --exclude=./.git --exclude=./.venv --exclude=./runs \
    --exclude=__pycache__ -C "$root" .
  run gcloud compute tpus tpu-vm scp "$folder/$archive" "$name:$archive" "${place[@]}" --worker=all
  on_all "mkdir -p jax_distill && tar -xzf $archive -C jax_distill && jax_distill/tpu_setup.sh"
}

mount_shared() {
  local made="sudo mkdir -p $mount_point && mountpoint -q $mount_point"
  if [[ -n $nfs ]]; then
    on_all "$made || { sudo apt-get install -qq -y nfs-common && sudo mount -t nfs -o hard,nconnect=8\
 $(quoted "$nfs") $mount_point && sudo chmod 1777 $mount_point; }"
    return
  fi
  # Where a bucket has no folders of its own, those of up to --rename-dir-limit files are renamed,
  # file by file. Without metadata caches hosts see each other's files at once.
  local fuse
  fuse="sudo chown \$(id -u) $mount_point && gcsfuse --implicit-dirs --rename-dir-limit=100000\
 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $(quoted "$bucket") $mount_point"
  on_all "$made || { command -v gcsfuse >/dev/null || { echo 'gcsfuse is missing; install it on all\
 hosts, see https://cloud.google.com/storage/docs/cloud-storage-fuse/install' >&2; exit 1; }; } &&\
 { mountpoint -q $mount_point || { $fuse; }; }"
}

# The run is a session of its own, so that it outlives the connection; its exit code is left beside
# its log.
start() {
  local train
  train=$(quoted launch/train.sh "${training[@]}")
  on_all "mkdir -p jax_distill_run && if $alive; then\
 echo 'error: a run is under way; tell it to stop first' >&2; exit 1; fi; rm -f jax_distill_run/code;\
 cd jax_distill && { setsid nohup bash -c $(quoted "$train; echo \$? >../jax_distill_run/code")\
 >>../jax_distill_run/log 2>&1 </dev/null & echo \$! >../jax_distill_run/pid; }"
}

start_again() { # hosts that have lost the others may still wait for them
  on_all "pid=\$(cat jax_distill_run/pid) && ! kill -KILL -- -\$pid 2>/dev/null || sleep 5"
  start
}

code() { # of the first host's run: "running", its exit code, "none"; nothing if it does not answer
  tpus tpu-vm ssh --worker=0 --command="if $alive; then echo running; else\
 cat jax_distill_run/code 2>/dev/null || echo none; fi" 2>/dev/null | tail -n 1 || true
}

remove() { # [--quiet]
  if [[ -n $queued ]]; then
    tpus queued-resources delete --force "$@"
  else
    tpus tpu-vm delete "$@"
  fi
}

is_there() { # STATE
  [[ $1 == READY || $1 == ACTIVE ]]
}

up() {
  if [[ -n $dry_run ]] || ! is_there "$(state)"; then
    create
  fi
  copy
  [[ -z $bucket$nfs ]] || mount_shared
  start
}

watch() {
  local ended failures=0
  if [[ -n $dry_run ]]; then
    up
    echo "# every $every seconds; when it was taken away, what follows and all of the above:"
    state
    code
    remove --quiet
    return
  fi
  while ((failures < 3)); do
    if ! is_there "$(state)"; then
      [[ -z $(state) ]] || remove --quiet || true # taken away, or left from an earlier try
      ended=none
    else
      ended=$(code)
    fi
    case $ended in
      0)
        echo "$name: the run is finished; delete the slice with: launch/tpu_vm.sh delete" \
          "$(quoted --name="$name" "${place[@]}" ${queued:+--queued})" >&2
        return
        ;;
      running) failures=0 ;;
      none) "$BASH" "${BASH_SOURCE[0]}" up "${given[@]}" || ((failures += 1)) ;; # stops at an error
      143) start_again || ((failures += 1)) ;; # told to stop while the slice stays, as to be mended
      "") ;; # it does not answer: its state will tell
      *)
        # A host that is taken away fails the others first.
        sleep "$every"
        if is_there "$(state)"; then
          ((failures += 1))
          echo "$name: the run failed with code $ended" >&2
          ((failures == 3)) || start_again || true
        fi
        ;;
    esac
    sleep "$every"
  done
  die "three failures in a row; see launch/tpu_vm.sh logs $(quoted --name="$name" "${place[@]}")"
}

[[ $# -gt 0 ]] || die "which command? see launch/tpu_vm.sh --help"
command=$1
shift
given=("$@")
name="" zone="" project="" type="" runtime="" bucket="" nfs="" queued="" spot=""
worker=0 every=60
training=()
[[ $command != --help ]] || { help_of "${BASH_SOURCE[0]}" && exit; }
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) help_of "${BASH_SOURCE[0]}" && exit ;;
    --dry_run) dry_run=yes ;;
    --queued) queued=yes ;;
    --spot) spot=yes ;;
    --name=* | --name) name=$(value_of "$1") ;;
    --zone=* | --zone) zone=$(value_of "$1") ;;
    --project=* | --project) project=$(value_of "$1") ;;
    --type=* | --type) type=$(value_of "$1") ;;
    --runtime=* | --runtime) runtime=$(value_of "$1") ;;
    --bucket=* | --bucket) bucket=$(value_of "$1") ;;
    --nfs=* | --nfs) nfs=$(value_of "$1") ;;
    --worker=* | --worker) worker=$(value_of "$1") ;;
    --every=* | --every) every=$(value_of "$1") ;;
    --)
      shift
      training=("$@")
      break
      ;;
    *) die "unknown option $1; arguments of jax_distill.main come after --" ;;
  esac
  shift
done
[[ -n $name ]] || die "--name is missing; name the slice, such as --name=scm"
[[ -n $zone ]] || die "--zone is missing; such as --zone=us-east5-a"
[[ $every =~ ^[1-9][0-9]*$ ]] || die "--every=$every is not a number of seconds"
[[ -z $bucket || -z $nfs ]] || die "--bucket and --nfs are both given; one of them is mounted"
[[ $bucket != gs://* ]] || die "--bucket=$bucket: give its name alone, without gs://"
place=(--zone="$zone" ${project:+--project="$project"})
case $command in
  create | up | watch)
    [[ -n $type ]] || die "--type is missing; such as --type=v6e-64"
    [[ -n $runtime ]] || runtime=$(runtime_of "$type")
    ;;
  mount) [[ -n $bucket$nfs ]] || die "--bucket or --nfs is missing; say what to mount" ;;
esac
case $command in
  run | up | watch)
    [[ ${#training[@]} -gt 0 ]] || die "nothing to run; put -- and the arguments of jax_distill.main last"
    check_training "${training[@]}"
    ;;
esac
case $command in
  create) create ;;
  copy) copy ;;
  mount) mount_shared ;;
  run) start ;;
  logs) tpus tpu-vm ssh --worker="$worker" --command="tail -n 100 -F jax_distill_run/log" ;;
  status)
    state
    code
    ;;
  stop) on_all "pkill -TERM --parent \"\$(cat jax_distill_run/pid)\"" ;; # the run, not who notes its code
  delete) remove ;;
  up) up ;;
  watch) watch ;;
  *) die "unknown command '$command'; see launch/tpu_vm.sh --help" ;;
esac
