#!/bin/sh
# Sees that the programs are there that some tests need and pip cannot install: Chromium for the page, Prometheus for
# the dashboard and the alerts. As root it installs Debian's through apt, once (Prometheus, whose package starts a
# server, only where CI=true). Where it cannot, it says so and goes on: those tests are skipped then, or fail where
# CI=true.
set -eu
cd "$(dirname "$0")/.."

found() {
    for name in "$@"; do
        if [ -n "$name" ] && command -v "$name" >/dev/null; then return; fi
    done
    return 1
}

# install PACKAGE: once, and whatever comes of it.
install() {
    tried=.venv/.tried-$1
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -e "$tried" ]; then
        echo "installing $1 for the tests ..." >&2
        apt-get update -q >/dev/null 2>&1 || :
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$1" >/dev/null 2>&1 || :
        touch "$tried"
    fi
}

chromium() { found "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; }
chromium || install chromium
chromium || echo "note: no Chromium here, so the tests of the page are skipped; install one (Debian: apt-get install chromium)" >&2

prometheus() { found prometheus && found promtool; }
prometheus || [ "${CI:-}" != true ] || install prometheus
prometheus || echo "note: no Prometheus here, so the tests of dashboard and alerts are skipped; install it (Debian: apt-get install prometheus)" >&2
