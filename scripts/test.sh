#!/usr/bin/env bash
# Sets up an environment and runs the tests:  bash scripts/test.sh [pytest arguments]
# Without arguments the slow tests are left out; `-m slow` runs those, `-m ""` all. EXTRAS=test,tpu installs libtpu
# too, and the ring is compiled for TPU slices. Files are shared among as many processes as there are cores, up to
# four; `-n 0` runs all in one.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
venv=${VENV:-.venv}
environment "$venv" "${EXTRAS:-test}"
[ $# -gt 0 ] || set -- -m "not slow"
case " $* " in
    *no:xdist*) ;;
    *" -n"* | *--numprocesses*) set -- --dist loadfile "$@" ;;
    *) set -- -n logical --maxprocesses 4 --dist loadfile "$@" ;;
esac
exec "$venv/bin/python" -m pytest -q "$@"
