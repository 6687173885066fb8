#!/usr/bin/env bash
# Does SmolLM2-135M read its context? All results of docs/results/needle.md, each with table, pictures and report:
#
#   bash scripts/needle_smollm2.sh OUTPUT [MODEL]     MODEL: SmolLM2-135M-Instruct.Q4_1.gguf, or its folder
#
#   OUTPUT/single       one needle, 1K to 7.9K, 5 depths, 5 needles a cell, exact
#   OUTPUT/multi        the same with 4 needles in and 2 asked
#   OUTPUT/longer       16K and 32K, no training: RoPE's theta scaled (ntk), and yarn
#   OUTPUT/methods      exact, window, window + sinks, retrieval (flat, hnsw, lsh) on the same questions, 2K to 7.9K
#   OUTPUT/perplexity   loss by position to 16K: as trained, theta scaled, yarn
#
# Every part goes on where it was stopped: run the same command again. PYTHON names the Python that has ringjax with its
# extras gguf and retrieval; NEEDLES the needles of a cell (5).
set -euo pipefail
if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
fi
output=$1 model=${2:-SmolLM2-135M-Instruct.Q4_1.gguf} needles=${NEEDLES:-5}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# Programs that were compiled once serve the other parts as well.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$output/.compiled}
export JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS=0.3

evaluate() {
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "${PYTHON:-python}" -m ringjax.cli eval "$1" "$model" --output "$output/$name" --progress none "${@:2}"
    printf '%s took %d s\n' "$name" $((SECONDS - start))
}

asked=(--template chat --depths 0 25 50 75 100)
evaluate single needle "${asked[@]}" --per_cell "$needles" --lengths 1024 2048 4096 8064
evaluate multi needle "${asked[@]}" --per_cell "$needles" --lengths 1024 2048 4096 8064 --needles 4 --retrieve 2
evaluate longer needle "${asked[@]}" --per_cell "$needles" --lengths 16384 32768 --method ntk yarn
evaluate methods needle "${asked[@]}" --per_cell 2 --lengths 2048 4096 8064 --window 1024 \
    --method exact window sinks flat hnsw lsh
evaluate perplexity perplexity --lengths 16384 --rows 8 --method exact ntk yarn --allow_beyond true
