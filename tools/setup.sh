#!/bin/sh
# Makes .venv with the project and one of its extras, and sees that libturbojpeg is there.
#   tools/setup.sh tools|bench|training|dev
# Does nothing, quickly, where all is as it should be. As root it installs missing system packages through apt;
# otherwise it names them and stops.
set -eu
cd "$(dirname "$0")/.."
extra=$1

say() { printf '%s\n' "$*" >&2; }

# system_package WHAT NAME...: the first of the packages NAME that apt knows.
system_package() {
    what=$1
    shift
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        say "error: $what is missing: install the package $1 (as root: apt-get install $1), then run this again"
        exit 1
    fi
    say "installing $1 for $what ..."
    apt-get update -q >/dev/null
    for name in "$@"; do
        if DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$name" >/dev/null 2>&1; then return; fi
    done
    say "error: apt-get could not install $*; install one of them by hand, then run this again"
    exit 1
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

python=$(find_python)
if [ -z "$python" ]; then
    system_package "Python 3.10 to 3.13" python3
    python=$(find_python)
    [ -n "$python" ] || { say "error: no Python 3.10 to 3.13 found; install one, or name it: make PYTHON=/path/to/python3 ..."; exit 1; }
fi

wanted="$extra $("$python" -c 'import sys; print(sys.version, sys.prefix)' | tr '\n' ' ') $(cat pyproject.toml requirements.lock | cksum) $(pwd)"
stamp=.venv/.stamp-$extra
# The extra dev holds all others but training.
within_dev() { [ "$extra" != training ] && [ "$(cat .venv/.stamp-dev 2>/dev/null)" = "dev${wanted#"$extra"}" ]; }
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] && ! within_dev; then
    if ! .venv/bin/python -c '' 2>/dev/null; then
        "$python" -c 'import ensurepip' 2>/dev/null ||
            system_package "Python's venv module" "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv" python3-venv
        say "making .venv ..."
        rm -rf .venv
        "$python" -m venv .venv
    fi
    say "installing Python packages ($extra): a minute or two, once ..."
    log=.venv/install.log
    failed=.venv/.install-failed
    rm -f "$stamp" "$failed"
    # A pipe has the status of its last part only, so pip's failure leaves a mark of its own.
    { .venv/bin/python -m pip install --disable-pip-version-check -c requirements.lock -e ".[$extra]" 2>&1 || : >"$failed"; } |
        tee "$log" | { grep -E '^(Collecting|Installing|Successfully|ERROR)' || :; } >&2
    if [ -e "$failed" ]; then
        rm -f "$failed"
        say "error: pip could not install the Python packages; run this again once that is mended. $log ends with:"
        tail -n 15 "$log" >&2
        exit 1
    fi
    .venv/bin/python -c 'import compositor, lipsync'
    printf '%s' "$wanted" >"$stamp"
fi

turbojpeg() { .venv/bin/python -c 'import ctypes; ctypes.CDLL("libturbojpeg.so.0")' 2>/dev/null; }
turbojpeg || system_package "the JPEG library libturbojpeg.so.0" libturbojpeg0 libturbojpeg
turbojpeg || { say "error: libturbojpeg.so.0 still cannot be loaded"; exit 1; }

if [ "$extra" = training ]; then
    command -v flite >/dev/null || system_package "the synthesiser flite" flite
    command -v espeak-ng >/dev/null || system_package "the synthesiser eSpeak NG" espeak-ng
    espeak_library() { .venv/bin/python -c 'import ctypes; ctypes.CDLL("libespeak-ng.so.1")' 2>/dev/null; }
    espeak_library || system_package "eSpeak NG's library libespeak-ng.so.1" libespeak-ng1
    # Recorded words are only looked at: `training evaluate` goes without them, and says so.
    [ -e /usr/share/sounds/alsa/Front_Center.wav ] || [ "$(id -u)" != 0 ] || system_package "recorded speech" alsa-utils
fi
