#!/bin/sh
# Install the programs that the tests start: as root with apt-get; otherwise name what is missing and fail.
set -eu

packages=""
need() { # PROGRAM DEBIAN_PACKAGE
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || packages="$packages $2"
}
need ip iproute2
need ssh openssh-client
need sshd openssh-server
need rsync rsync
need fish fish
need tcsh tcsh
[ -n "$packages" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing what the tests need:$packages"
    for attempt in 1 2 3; do
        if apt-get -q update >/dev/null &&
            DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $packages >/dev/null; then
            exit 0
        fi
        sleep $((attempt * 5))
    done
fi
echo "the tests need programs that are missing; install them: sudo apt-get install$packages" >&2
exit 2
