#!/bin/sh
# Sees that there is a Chromium for the tests of the page. As root it installs Debian's through apt, once; where it
# cannot, it says so and goes on: those tests are skipped then, or fail where CI=true.
set -eu
cd "$(dirname "$0")/.."

found() {
    for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; do
        if [ -n "$name" ] && command -v "$name" >/dev/null; then return; fi
    done
    return 1
}

if found; then exit 0; fi
tried=.venv/.tried-chromium
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -e "$tried" ]; then
    echo "installing chromium for the tests of the page ..." >&2
    apt-get update -q >/dev/null 2>&1 || :
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium >/dev/null 2>&1 || :
    if found; then exit 0; fi
    touch "$tried"
fi
echo "note: no Chromium here, so the tests of the page are skipped; install one (Debian: apt-get install chromium)" >&2
