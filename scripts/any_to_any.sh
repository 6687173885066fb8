#!/usr/bin/env bash
# From captioned pictures, captioned clips and books to a model that reads and writes all three:
#
#   bash scripts/any_to_any.sh DATA SMOLLM2.gguf     SmolLM2-135M goes on (configs/any_to_any.yaml)
#   bash scripts/any_to_any.sh DATA --small          a model of 19 MB from nothing (configs/small_any_to_any.yaml)
#
# DATA holds images/ and videos/ (captions.jsonl and the files that it names) and text/ (*.txt). Further arguments are
# laid over the config: --data.bidirectional_frames false --run_dir runs/causal. Each step is left out where its result
# is there already, so the same command goes on after a stop:
#
#   data/NAME/vqgan.safetensors   an image tokenizer of 1,024 codes, 8 × 8 a picture: VQGAN=FILE names one, otherwise
#                                 configs/vqgan_128.yaml (vqgan_small.yaml) is trained
#   data/NAME/…                   tokenized: pictures, clips, their first frames alone, turns, long videos, prose, and
#                                 what is held out
#   runs/NAME                     the model
#   runs/NAME/released            --small: the folder that `ringjax generate` takes, and the package ships
#   runs/NAME/gallery.png …       captions that it learned, drawn; gallery_unseen.png: held-out ones, also recognised
#                                 among ten; perplexity, a needle in a video
#
# RINGJAX is the command (ringjax), PYTHON its interpreter (python), VARIANTS how differently a picture is seen (16).
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 2; fi
ringjax=${RINGJAX:-ringjax} python=${PYTHON:-python}
given=$(realpath "$1") small='' name=any_to_any vqgan=vqgan_128 variants=${VARIANTS:-16}
if [ "$2" = --small ]; then
    small=1 name=small_any_to_any vqgan=vqgan_small variants=${VARIANTS:-32}
else
    model=$(realpath "$2")
fi
shift 2
[ -z "${VQGAN:-}" ] || VQGAN=$(realpath "$VQGAN")
cd "$(dirname "$0")/.."
out=data/$name config=configs/$name.yaml
images=$given/images/captions.jsonl videos=$given/videos/captions.jsonl
mkdir -p "$out"
say() { echo "any_to_any: $* (after $SECONDS s)"; }

# Text: SmolLM2's own tokenizer, or one learned from the captions.
if [ -n "$small" ]; then
    tokenizer=$out/tokenizer.json
    [ -f "$tokenizer" ] || "$python" scripts/train_caption_tokenizer.py "$given" "$tokenizer"
else
    tokenizer=$out/smollm2.gguf
    ln -sfn "$model" "$tokenizer"
fi

# Pictures: codes. The small tokenizer is shipped in half of its bytes, so that is the one that makes the codes.
if [ ! -f "$out/vqgan.safetensors" ]; then
    if [ -z "${VQGAN:-}" ]; then
        say "training the image tokenizer"
        "$ringjax" train "configs/$vqgan.yaml" --data.sources "[{path: $images, weight: 3}, {path: $videos, weight: 1}]"
        VQGAN=runs/$vqgan/tokenizer.safetensors
    fi
    if [ -n "$small" ]; then
        "$ringjax" convert "$VQGAN" "$out/vqgan.safetensors"
    else
        cp "$VQGAN" "$out/vqgan.safetensors"
    fi
fi

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

# tokenize SET INPUT … --option …: into $out/SET, unless it is there; all in one process, at the end
commands=''
tokenize() {
    local set=$1
    shift
    [ -f "$out/$set/meta.json" ] ||
        commands+="$(printf '%q ' "$@" --output "$out/$set" --tokenizer "$tokenizer")"$'\n'
}
look=(--vision_tokenizer "$out/vqgan.safetensors" --on_error skip --long_captions truncate)
train=("${look[@]}" --split train --mirror)
tokenize images "$images" "${train[@]}" --variants "$variants" --fields "${see[@]}" "${sort[@]}" "${draw[@]}" "${draw[@]}"
tokenize videos "$videos" "${train[@]}" --variants "$variants" --fields "${see[@]}" "${film[@]}"
# A clip's first frame as a picture of its own: in the clip it is a sixteenth of one example.
tokenize stills "$videos" "${train[@]}" --variants "$variants" --max_frames 1 --fields "${see[@]}" "${draw[@]}"
tokenize turns "$images" "$videos" "${train[@]}" --variants 4 --join 8 --join_least 2 --fields "${turns[@]}"
tokenize heldout_images "$images" "${look[@]}" --split heldout --fields '[vision],caption' '[caption],vision'
tokenize heldout_videos "$videos" "${look[@]}" --split heldout --fields '[vision],caption' '[caption],vision'
if [ -z "$small" ]; then
    tokenize prose "$out/prose.jsonl" --fields text
    tokenize heldout_prose "$out/heldout_prose.jsonl" --fields text
    tokenize books "$out/books.jsonl" --fields text
    tokenize needles "$videos" "${train[@]}" --variants 2 --join 31 --join_least 4 --join_as needle --fields "${find[@]}"
    tokenize long_videos "$videos" "${train[@]}" --variants 8 --join 30 --join_least 8 --join_as video \
        --caption_words 1000 --fields "${list[@]}"
fi
if [ -n "$commands" ]; then
    say "tokenizing"
    "$python" scripts/tokenize_all.py <<<"$commands"
fi

run=runs/$name
for ((i = 1; i < $#; i++)); do
    [ "${!i}" = --run_dir ] && j=$((i + 1)) && run=${!j}
done
say "training $config in $run"
"$ringjax" train "$config" "$@"
if [ -n "$small" ] && [ ! -d "$run/released" ]; then
    "$ringjax" convert "$run" "$run/released"
fi

say "asking it about what it has never seen"
unseen=("$run" --data "$images" "$videos" --split heldout)
"$ringjax" eval captions "${unseen[@]}" --output "$run/captions"
"$ringjax" eval drawings "${unseen[@]}" --count "${DRAWINGS:-100}" --output "$run/drawings"
for split in heldout train; do
    [ $split = train ] && picture=gallery || picture=gallery_unseen
    "$ringjax" eval gallery "$run" --data "$images" "$videos" --split $split --temperature 0.3 --guidance 2 \
        --output "$run/$picture.png"
done
if [ -z "$small" ]; then
    for which in before after; do
        [ "$which" = before ] && asked=$tokenizer || asked=$run
        "$ringjax" eval perplexity "$asked" --haystack "$out/heldout_prose.jsonl" --repeat_haystack true --lengths 2048 \
            --rows 64 --output "$run/perplexity_$which"
    done
    for split in heldout train; do
        "$ringjax" eval video_needle "$run" --data "$videos" --split $split --haystack "$videos" --haystack_split train \
            --lengths 8192 32768 --choices 8 --output "$run/video_needle_$split"
    done
fi
say "done: $run/gallery_unseen.png, and report.html in $run/captions and beside it"
