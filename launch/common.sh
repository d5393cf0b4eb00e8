# shellcheck shell=bash
# Sourced by the launch scripts: errors, dry runs, and what a training command must have.
dry_run=""

die() {
  echo "error: $*" >&2
  exit 1
}

# The words of a command as one line that a shell, Bash or another, reads back as the same words.
quoted() {
  local word line="" quote="'" inside="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//$quote/$inside}'"
    fi
  done
  printf '%s\n' "${line# }"
}

# Runs a command, or prints it under --dry_run.
run() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# Prints the comment at the head of a script: its help.
help_of() {
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$1"
}

# The value of --flag=value; an empty one is an error.
value_of() {
  [[ $1 == *=?* ]] || die "${1%%=*} has no value; write ${1%%=*}=VALUE"
  printf '%s\n' "${1#*=}"
}

# Whether the arguments of jax_distill.main can run on several hosts at once; sets `workdir`.
check_training() {
  local argument config=""
  workdir=""
  for argument in "$@"; do
    case $argument in
      --config=*) config=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
    esac
  done
  [[ -n $config ]] || die "--config is missing after --; such as -- --config=configs/scm.py"
  case $workdir in
    /* | gs://*/*) ;;
    *) die "--workdir is missing after --, or relative; give a folder of a bucket, such as" \
      "--workdir=gs://BUCKET/scm, or one that all hosts share, such as /mnt/jax_distill/scm" ;;
  esac
}
