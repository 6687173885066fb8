#!/usr/bin/env bash
# Sets up an environment, trains a small any-to-any model and shows what it has learned:
#
#   bash scripts/quickstart.sh            6 to 9 minutes on two cores, the installation included
#   bash scripts/quickstart.sh --short    the same steps with hardly any training: checks that everything runs
#   bash scripts/quickstart.sh --fresh    forget an earlier run and train again
#
# Run twice, it goes on where it was stopped, or shows again what is there. Without an accelerator it simulates eight
# devices on the CPU. PYTHON names the Python to use, VENV the folder of the environment (.venv).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

short='' fresh=''
[ "${RINGJAX_QUICKSTART:-}" = short ] && short=1
for argument in "$@"; do
    case $argument in
    --short) short=1 ;;
    --fresh) fresh=1 ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) echo "quickstart.sh: unknown argument $argument; use --short, --fresh or none" >&2 && exit 2 ;;
    esac
done

start=$SECONDS
venv=${VENV:-.venv}
extras=quickstart
if [ "${JAX_PLATFORMS:-}" != cpu ]; then
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then
        extras=quickstart,gpu
    elif ls /dev/accel* >/dev/null 2>&1; then
        extras=quickstart,tpu
    fi
fi
environment "$venv" "$extras"

run_dir=runs/quickstart
overrides=()
if [ -n "$short" ]; then
    run_dir=runs/quickstart-short
    fresh=1 # seconds of training: not worth going on with
    overrides=(--training.steps 20 --training.eval_every 0 --optimizer.warmup_steps 5 --logging.every 10)
fi
[ -z "$fresh" ] || rm -rf "$run_dir"

echo "training configs/quickstart.yaml in $run_dir (after $((SECONDS - start)) s)"
code=0
"$venv/bin/ringjax" train configs/quickstart.yaml --run_dir "$run_dir" ${overrides[@]+"${overrides[@]}"} || code=$?
if [ "$code" != 0 ]; then
    [ "$code" = 75 ] || echo "to begin anew: bash scripts/quickstart.sh --fresh" >&2
    exit "$code"
fi

echo "looking at what it has learned (after $((SECONDS - start)) s)"
"$venv/bin/python" -m ringjax.evaluation.quickstart "$run_dir" ${short:+--short} || code=$?
echo "done in $((SECONDS - start)) s"
exit "$code"
