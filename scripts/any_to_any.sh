#!/usr/bin/env bash
# From captioned pictures, captioned clips and books to a model that reads and writes all three:
#
#   bash scripts/any_to_any.sh DATA SMOLLM2.gguf      DATA holds images/, videos/ (captions.jsonl) and text/ (*.txt)
#
# Steps, each left out where its result is there already, so that the same command goes on after a stop:
#   data/any_to_any/vqgan.safetensors   an image tokenizer of 1,024 codes, 8 × 8 a picture: VQGAN=FILE names one,
#                                       otherwise configs/vqgan_128.yaml is trained
#   data/any_to_any/*                   tokenized: pictures, clips, turns, long videos, prose, and what is held out
#   runs/any_to_any                     configs/any_to_any.yaml, with ARGS laid over it
#   runs/any_to_any/report              what it reads and draws of what it has never seen
#
# RINGJAX is the command (ringjax), PYTHON its interpreter (python), VARIANTS how differently a picture is seen (16),
# CONFIG another config that uses the same data, TOKENIZER its text tokenizer (SMOLLM2.gguf).
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2; fi
given=$(realpath "$1") model=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."
ringjax=${RINGJAX:-ringjax} python=${PYTHON:-python} variants=${VARIANTS:-16}
config=${CONFIG:-configs/any_to_any.yaml} out=data/any_to_any
mkdir -p "$out"
ln -sfn "$model" "$out/smollm2.gguf"
tokenizer=${TOKENIZER:-$out/smollm2.gguf}
say() { echo "any_to_any: $* (after $SECONDS s)"; }

if [ ! -f "$out/vqgan.safetensors" ]; then
    if [ -z "${VQGAN:-}" ]; then
        say "training the image tokenizer"
        "$ringjax" train configs/vqgan_128.yaml \
            --data.sources "[{path: $given/images/captions.jsonl, weight: 3}, {path: $given/videos/captions.jsonl}]"
        VQGAN=runs/vqgan_128/tokenizer.safetensors
    fi
    cp "$VQGAN" "$out/vqgan.safetensors"
fi

images=$given/images/captions.jsonl videos=$given/videos/captions.jsonl
[ -f "$out/prose.jsonl" ] && [ -f "$out/heldout_videos.jsonl" ] ||
    "$python" scripts/any_to_any_data.py "$given" "$out"

# What is asked in several ways, so that the model is tied to none; the bare form, and LWM's, are among them.
see=('[vision],caption' '[vision],caption' '[vision,"What is this?"],caption' '["Look:",vision],caption'
    '["You are a helpful assistant. USER: What is this?\n",vision," ASSISTANT:"],caption')
draw=('[caption],vision' '[caption],vision' '["Draw"+caption],vision' '["A picture of"+caption+":"],vision'
    '["You are a helpful assistant. USER: Generate an image of"+caption+"ASSISTANT:"],vision')
film=('[caption],vision' '[caption],vision' '["A clip of"+caption+":"],vision'
    '["You are a helpful assistant. USER: Generate a video of"+caption+"ASSISTANT:"],vision')
sort=('[vision,"What kind of thing is this?"],category')
turns=('caption,vision,"\n"' 'vision,caption,"\n"' '"This is"+caption+":",vision,"\n"')
find=('[vision,"What else appears in the video?"],caption' '[vision,"Which clip is there only once?"],caption')
list=('[vision],caption' '[vision,"What appears in the video, in order?"],caption')

# tokenize NAME INPUT … --option …: into $out/NAME, unless it is there
commands=''
tokenize() {
    local name=$1
    shift
    [ -f "$out/$name/meta.json" ] ||
        commands+="$(printf '%q ' "$@" --output "$out/$name" --tokenizer "$tokenizer")"$'\n'
}
look=(--vision_tokenizer "$out/vqgan.safetensors" --on_error skip --long_captions truncate)
train=("${look[@]}" --split train --mirror)
say "tokenizing"
tokenize images "$images" "${train[@]}" --variants "$variants" --fields "${see[@]}" "${sort[@]}" "${draw[@]}" "${draw[@]}"
tokenize videos "$videos" "${train[@]}" --variants "$variants" --fields "${see[@]}" "${film[@]}"
tokenize turns "$images" "$videos" "${train[@]}" --variants 4 --join 8 --join_least 2 --fields "${turns[@]}"
tokenize heldout_images "$images" "${look[@]}" --split heldout --fields '[vision],caption' '[caption],vision'
tokenize heldout_videos "$videos" "${look[@]}" --split heldout --fields '[vision],caption' '[caption],vision'
tokenize prose "$out/prose.jsonl" --fields text
tokenize heldout_prose "$out/heldout_prose.jsonl" --fields text
tokenize books "$out/books.jsonl" --fields text
if [ -z "${SHORT:-}" ]; then
    tokenize needles "$videos" "${train[@]}" --variants 2 --join 31 --join_least 4 --join_as needle --fields "${find[@]}"
    tokenize long_videos "$videos" "${train[@]}" --variants 8 --join 30 --join_least 8 --join_as video \
        --caption_words 1000 --fields "${list[@]}"
fi

[ -z "$commands" ] || "$python" scripts/tokenize_all.py <<<"$commands"

say "training $config"
"$ringjax" train "$config" "$@"
say "done"
