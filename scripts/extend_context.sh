#!/usr/bin/env bash
# SmolLM2-135M from 8K to 32K and 128K tokens, and what it can do before and after each stage:
#
#   bash scripts/extend_context.sh OUTPUT [MODEL] [TEXTS]     MODEL: SmolLM2-135M-Instruct.Q4_1.gguf, or its folder
#                                                             TEXTS: the folder of books, data/text; Emma is kept apart
#   OUTPUT/before/…             no training: RoPE's theta scaled (ntk), and yarn
#   OUTPUT/VARIANT/run          the run: metrics.jsonl, loss.png, checkpoints of both stages
#   OUTPUT/VARIANT/adapter      of lora: the adapters alone, in PEFT's form
#   OUTPUT/VARIANT/32k_…, 128k_…  after each stage
#       digits       one needle, 8,000 to 128,000 tokens, 5 depths, by likelihood
#       answers      the same, greedy answers in a conversation      multi   4 needles in and 2 asked, by greedy answers
#       perplexity   loss by position in Emma, to 128K tokens
#   OUTPUT/summary.md           all of it in one table; digits.png, answers.png, multi.png, perplexity.png
#
# Variants: full (configs/extend_135m.yaml), lora (configs/extend_135m_lora.yaml): books alone. full_recall and lora_recall
# train on documents with facts in them too, half of all tokens, which are asked at their end (scripts/recall_documents.py):
# other words and other keys than the needles', but the same skill. lora_recall attends to whole rows, not to groups.
#
# Every part goes on where it was stopped: run the same command again. In the environment: VARIANTS ("full lora"), PYTHON,
# NEEDLES (questions a cell, 4), CHAT (share of conversations among the documents of facts, 0.5), STEPS_32K and STEPS_128K
# (of training), OPTIONS (more of `ringjax train`), LENGTHS and LONGEST (the row of perplexity) of the measurements, BEFORE=
# (empty: leave it out), and TOGETHER=1: measurements side by side on one accelerator.
set -euo pipefail
if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,22s/^# \{0,1\}//p' "$0"
    exit 2
fi
output=$1 model=${2:-SmolLM2-135M-Instruct.Q4_1.gguf} texts=${3:-data/text}
variants=${VARIANTS-full lora} needles=${NEEDLES:-4} together=${TOGETHER:-} chat=${CHAT:-0.5} python=${PYTHON:-python}
lengths=(${LENGTHS:-8000 16000 32000 64000 128000})
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$output"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
# Programs that were compiled once serve the other parts as well.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$output/.compiled}
export JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS=0.3
[ -z "$together" ] || export XLA_PYTHON_CLIENT_PREALLOCATE=false

part() { # FOLDER KIND MODEL OPTION …
    local folder=$output/$1 kind=$2 from=$3 start=$SECONDS code=0
    shift 3
    "$python" -m ringjax.cli eval "$kind" "$from" --output "$folder" --haystack "$texts/emma.txt" --progress none "$@" \
        >"$folder.log" 2>&1 || code=$?
    printf '\n== %s (%d s)\n' "${folder#"$output"/}" $((SECONDS - start))
    cat "$folder.log"
    return $code
}
failed=0 # a part that fails leaves the others alone
begin() { if [ -n "$together" ]; then part "$@" & else part "$@" || failed=1; fi; }
finish() { while [ -n "$(jobs -p)" ]; do wait -n || failed=1; done; }

asked=(--template chat --depths 0 25 50 75 100 --per_cell "$needles" --lengths "${lengths[@]}" --allow_beyond true)
several=(--needles 4 --retrieve 2 --max_new_tokens 48)
longest=${LONGEST:-131072}
measure() { # FOLDER MODEL OPTION … : everything that is asked of one model
    local folder=$1 from=$2
    shift 2
    begin "${folder}digits" needle "$from" "${asked[@]}" --score likelihood "$@"
    begin "${folder}answers" needle "$from" "${asked[@]}" "$@"
    begin "${folder}multi" needle "$from" "${asked[@]}" "${several[@]}" "$@"
    begin "${folder}perplexity" perplexity "$from" --lengths $longest --rows 1 --allow_beyond true "$@"
}

sources() { # the books of the configs, from where they are, and the documents of facts for rows of $1 tokens (0: none)
    local share name rows=$1 list=
    for name in pride_and_prejudice:1 sense_and_sensibility:1 mansfield_park:1 northanger_abbey:0.5 bible_kjv_old_testament:1.5; do
        list+="{path: $texts/${name%:*}.txt, weight: ${name#*:}}, "
    done
    [ "$rows" = 0 ] || list+="{path: $output/recall_${rows}_$chat.jsonl, weight: 6}, "
    echo "[${list%, }]"
}

train() { # VARIANT
    local variant=$1 config=$root/configs/extend_135m.yaml start=$SECONDS options=()
    [[ $variant == lora* ]] && config=$root/configs/extend_135m_lora.yaml
    options=(--init_from "$model" --data.tokenizer "$model" --data.heldout "[{path: $texts/emma.txt}]")
    options+=(--run_dir "$output/$variant/run" --logging.progress plain)
    [ -z "${STEPS_32K:-}" ] || options+=(--stages.0.training.steps "$STEPS_32K" --stages.0.training.eval_every "$STEPS_32K")
    [ -z "${STEPS_128K:-}" ] || options+=(--stages.1.training.steps "$STEPS_128K" --stages.1.training.eval_every "$STEPS_128K")
    if [[ $variant == *recall ]]; then
        local rows stage=0
        for rows in 32768 131072; do
            [ -f "$output/recall_${rows}_$chat.jsonl" ] || "$python" "$root/scripts/recall_documents.py" "$texts" \
                "$output/recall_${rows}_$chat.jsonl" --tokens $rows --tokenizer "$model" --without emma --chat "$chat"
            options+=(--stages.$stage.data.sources "$(sources $rows)")
            # Shifted groups would cut most facts from their questions.
            [[ $variant != lora* ]] || options+=(--stages.$stage.model.shifted_group null)
            stage=$((stage + 1))
        done
    else
        options+=(--data.sources "$(sources 0)")
    fi
    # shellcheck disable=SC2206  # options are words
    options+=(${OPTIONS:-})
    mkdir -p "$output/$variant"
    "$python" -m ringjax.cli train "$config" "${options[@]}" 2>&1 | tee "$output/$variant/train.log"
    [[ $variant != lora* ]] || [ -d "$output/$variant/adapter" ] ||
        "$python" -m ringjax.cli convert "$output/$variant/run" "$output/$variant/adapter" --adapter true
    printf '== %s: trained (%d s)\n' "$variant" $((SECONDS - start))
}

if [ -n "${BEFORE-yes}" ]; then
    mkdir -p "$output/before"
    measure before/ "$model" --method ntk yarn
    finish
fi
for variant in $variants; do
    train "$variant"
    for stage in 32k 128k; do measure "$variant/${stage}_" "$output/$variant/run" --stage $stage; done
    finish
done
"$python" "$root/scripts/extend_summary.py" "$output" | tee "$output/summary.md"
exit $failed
