"""What is fuzzed: for each kind of file its seeds, the library's own reader, and how errors may look."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

from ringjax.training.manifest import DamagedCheckpoint
from tests.fuzz import formats, readers, seals, seeds, seeds_models, seeds_runs
from tests.fuzz.seeds import Case


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader; `read` is given the folder of a case. `finish` puts checksums right after a change."""

    name: str
    seeds: Callable[[], list[Case]]
    read: Callable[[Path], object]
    errors: tuple[type, ...] = readers.ERRORS
    finish: Callable[[random.Random, Case], Case] = lambda rng, case: case
    words: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    """What else a message may name the file by."""


def change(target: Target, rng: random.Random, case: Case, cases: list[Case]) -> Case:
    """A case with one or two files changed."""
    case = dict(case)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(_weighted(list(case)))
        others = [one[name] for one in cases if name in one]
        base = name.rsplit("/", 1)[-1]
        case[name] = formats.changed(rng, base, case[name], others)
        if len(case) > 1 and rng.random() < 0.02:
            del case[name]
            break
    return target.finish(rng, case)


def _weighted(names: list[str]) -> list[str]:
    """Descriptions three times as often as what they describe: it is them that readers believe."""
    return [name for name in names for _ in range(3 if name.endswith((".json", ".jsonl", ".yaml")) else 1)]


_CHECKPOINT = (*readers.ERRORS, DamagedCheckpoint)


def _targets() -> list[Target]:
    from ringjax.training.checkpoint import CheckpointError

    return [
        Target(
            "jsonl",
            seeds.jsonl,
            readers.read_jsonl,
            words=("fields", "vision", "[a],b", '"', '"a"+b', "<|bos|>", "<|eos|>", "<|x|>", "a+b", "[", "]"),
        ),
        Target("record", seeds.record, readers.read_record, finish=seals.finish_record),
        Target(
            "records",
            seeds.records,
            readers.read_records,
            finish=seals.finish_records,
            words=("shards", "file", "00000.array_record"),
        ),
        Target("pictures", seeds.pictures, readers.read_picture),
        Target(
            "picture_set",
            seeds.picture_set,
            readers.read_picture_set,
            words=("file", "a.png", "b.gif", "../a.png", "/dev/zero", "/etc/hostname"),
        ),
        Target(
            "config",
            seeds.config,
            readers.read_config,
            words=("model", "heads", "vqgan", "stages", "size", "lora", "init_from", "rope_scaling"),
        ),
        Target(
            "tokenizer",
            seeds_models.tokenizer,
            readers.read_tokenizer,
            words=("model", "vocab", "merges", "Regex", "(a+)+$", "BPE", "Unigram", "type", "Sequence", "id"),
        ),
        Target("sentencepiece", seeds_models.sentencepiece, readers.read_tokenizer),
        Target("template", seeds_models.template, readers.read_template, names=("chat template",)),
        Target("gguf", seeds_models.gguf, readers.read_gguf),
        Target(
            "gguf_header",
            seeds_models.gguf,
            readers.read_gguf_tokenizer,
            words=("llama.block_count", "blk.999999999.attn_norm.weight"),
        ),
        Target("safetensors", seeds_models.safetensors, readers.read_safetensors),
        Target("vqgan", seeds_models.vqgan, readers.read_vqgan),
        Target("vqmodel", seeds_models.vqmodel, readers.read_vqmodel),
        Target("pickle", seeds_models.pickled, readers.read_pickle),
        Target("lwm", seeds_models.lwm, readers.read_lwm_index),
        Target("lwm_model", seeds_models.lwm, readers.read_lwm),
        Target(
            "hf_config",
            seeds_models.hf_config,
            readers.read_hf_config,
            words=("rope_scaling", "rope_parameters", "layer_types", "eos_token_id", "head_dim", "yarn", "llama3"),
        ),
        Target("hf", seeds_models.hf, readers.read_hf, names=("chat template",)),
        Target(
            "llava_config",
            seeds_models.llava_config,
            readers.read_llava_config,
            words=("text_config", "vision_config", "size", "crop_size", "resample"),
        ),
        Target("llava", seeds_models.llava, readers.read_llava),
        Target("peft", seeds_models.peft, readers.read_peft),
        Target("release", seeds_models.release, readers.read_release),
        Target(
            "checkpoint",
            seeds_runs.checkpoint,
            readers.read_checkpoint,
            (*_CHECKPOINT, CheckpointError),
            finish=seals.finish_manifest("checkpoints/step_00000002/"),
        ),
        Target(
            "manifest",
            seeds_runs.manifest,
            readers.read_manifest,
            (*_CHECKPOINT, CheckpointError),
            finish=seals.finish_manifest(""),
        ),
        Target("results", seeds_runs.results, readers.read_results),
        Target("metrics", seeds_runs.metrics, readers.read_metrics),
        Target("texts", seeds_runs.texts, readers.read_texts),
    ]


TARGETS: dict[str, Target] = {target.name: target for target in _targets()}


def find(name: str) -> Target:
    """A target by its name, that of the fuzzer's own test too."""
    from tests.fuzz import faulty

    return faulty.TARGET if name == faulty.TARGET.name else TARGETS[name]


def learn_words(target: Target, cases: list[Case]) -> None:
    """Tell the mutations what this target's reader knows."""
    for case in cases:
        for name in case:
            formats.WORDS[name.rsplit("/", 1)[-1]] = target.words
