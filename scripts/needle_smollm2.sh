#!/usr/bin/env bash
# Does SmolLM2-135M read its context? What docs/results/needle.md shows, each part with table, pictures and report:
#
#   bash scripts/needle_smollm2.sh OUTPUT [MODEL]     MODEL: SmolLM2-135M-Instruct.Q4_1.gguf, or its folder
#
#   OUTPUT/single         one needle, 1,000 to 8,000 tokens, 5 depths, 5 needles a cell, exact attention
#   OUTPUT/digits         the same by likelihood
#   OUTPUT/multi          4 needles in and 2 asked
#   OUTPUT/longer         16,000 and 32,000 tokens, no training: RoPE's theta scaled (ntk), and yarn
#   OUTPUT/longer_digits  the same by likelihood
#   OUTPUT/methods        exact, window, window + sinks, retrieval (flat, hnsw, lsh), 2,000 to 8,000 tokens;
#                         `methods_digits` by likelihood
#   OUTPUT/perplexity     loss by position to 16K: as trained, theta scaled, yarn, window, window + sinks
#
# Every part goes on where it was stopped: run the same command again. PYTHON names the Python that has ringjax with its
# extras gguf and retrieval, NEEDLES the needles of a cell (5), PARTS the parts to run (all). With TOGETHER=1 all parts but
# `methods` run side by side on one accelerator, on a GPU with products that are not tuned, which compile faster: their
# times mean nothing. Those of `methods`, which runs alone, do.
set -euo pipefail
if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,19s/^# \{0,1\}//p' "$0"
    exit 2
fi
output=$1 model=${2:-SmolLM2-135M-Instruct.Q4_1.gguf} needles=${NEEDLES:-5} together=${TOGETHER:-}
parts=${PARTS:-single longer perplexity methods_digits multi digits longer_digits methods}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$output"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
# Programs that were compiled once serve the other parts as well.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$output/.compiled}
export JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS=0.3
untuned="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

part() { # NAME KIND OPTION …
    local name=$1 kind=$2 start=$SECONDS code=0
    shift 2
    "${PYTHON:-python}" -m ringjax.cli eval "$kind" "$model" --output "$output/$name" --progress none "$@" \
        >"$output/$name.log" 2>&1 || code=$?
    printf '\n== %s (%d s)\n' "$name" $((SECONDS - start))
    cat "$output/$name.log"
    return $code
}
failed=0 # a part that fails leaves the others alone
begin() { # as `part`, if it is wanted; beside the others with TOGETHER
    case " $parts " in *" $1 "*) ;; *) return 0 ;; esac
    if [ -n "$together" ] && [ "$1" != methods ]; then
        XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS="${XLA_FLAGS:-} $untuned" part "$@" &
    else
        part "$@" || failed=1
    fi
}
finish() { while [ -n "$(jobs -p)" ]; do wait -n || failed=1; done; }

# Thousands: prompt and answer stay below the power of two that a cache grows to, and that programs are made for.
asked=(--template chat --depths 0 25 50 75 100)
short=("${asked[@]}" --per_cell "$needles" --lengths 1000 2000 4000 8000)
long=("${asked[@]}" --per_cell "$needles" --lengths 16000 32000 --method ntk yarn)
methods=("${asked[@]}" --per_cell 2 --lengths 2000 4000 8000 --method exact window sinks flat hnsw lsh)
begin single needle "${short[@]}"
begin longer needle "${long[@]}"
begin perplexity perplexity --lengths 16384 --rows 8 --method exact ntk yarn window sinks --allow_beyond true
begin methods_digits needle "${methods[@]}" --score likelihood
begin multi needle "${short[@]}" --needles 4 --retrieve 2 --max_new_tokens 48
begin digits needle "${short[@]}" --score likelihood
begin longer_digits needle "${long[@]}" --score likelihood
finish
begin methods needle "${methods[@]}"
exit $failed
