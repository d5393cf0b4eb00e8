#!/usr/bin/env bash
# Installs gcsfuse on a host with Debian or Ubuntu, from Google's packages, as
# https://cloud.google.com/storage/docs/cloud-storage-fuse/install says; needs sudo.
#
#   launch/install_gcsfuse.sh [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1-} in
  "") ;;
  --dry_run) dry_run=yes ;;
  --help) help_of "${BASH_SOURCE[0]}" && exit ;;
  *) die "$1 is no option of launch/install_gcsfuse.sh" ;;
esac
packages=https://packages.cloud.google.com/apt
key=/usr/share/keyrings/cloud.google.asc
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
[[ -n $release ]] || die "/etc/os-release names no release of Debian or Ubuntu; install gcsfuse by hand"
run sudo curl --fail --silent --show-error --location --output "$key" $packages/doc/apt-key.gpg
run sudo sh -c \
  "echo 'deb [signed-by=$key] $packages gcsfuse-$release main' >/etc/apt/sources.list.d/gcsfuse.list"
run sudo apt-get update -qq
run sudo apt-get install -qq -y gcsfuse
