"""What is fuzzed: for each kind of file its seeds, the library's own reader, and how errors may look."""

import contextlib
import dataclasses
import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from ringjax.data.errors import DataError
from ringjax.training.manifest import DamagedCheckpoint
from ringjax.training.yaml_tree import ConfigError
from tests.fuzz import formats, seeds
from tests.fuzz.seeds import Case

_TEXT = "Hello there, 123 é 漢字 <|im_start|>\n\tabc cab\0"
ERRORS = (ValueError, DataError, ConfigError, FileNotFoundError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader; `read` is given the folder of a case. `finish` puts checksums right after a change."""

    name: str
    seeds: Callable[[], list[Case]]
    read: Callable[[Path], object]
    errors: tuple[type, ...] = ERRORS
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


# --- readers --------------------------------------------------------------------------------------------------------


def _all(reads: list[Callable[[], object]], passing: tuple[type, ...]) -> None:
    """Every read; the last of the documented errors is raised at the end, any other at once."""
    last = None
    for read in reads:
        try:
            read()
        except passing as error:
            if type(error) not in passing:
                raise
            last = error
    if last is not None:
        raise last


def _read_jsonl(folder: Path) -> None:
    from ringjax.data.fields import FieldEncoder
    from ringjax.data.jsonl import JsonLines
    from ringjax.data.tokenizers import ByteTokenizer, load_tokenizer

    lines = JsonLines(folder / "lines.jsonl")
    encoders = [
        FieldEncoder(one, codes_per_frame=4, vision_codes=100) for one in (ByteTokenizer(), load_tokenizer("sample"))
    ]
    _all(
        [
            lambda row=row, encoder=encoder: encoder.encode_line(lines[row], "text", row, lines.place(row))
            for row in range(len(lines))
            for encoder in encoders
        ],
        (DataError,),
    )


def _read_record(folder: Path) -> None:
    from ringjax.data.records import decode_record

    decode_record((folder / "a.record").read_bytes(), str(folder / "a.record"))


def _finish_record(rng: random.Random, case: Case) -> Case:
    content = case.get("a.record", b"")
    if rng.random() < 0.5 and len(content) >= 16:
        (n,) = struct.unpack_from("<I", content, 8)
        wanted = 12 + 4 * n + 2 * ((n + 7) // 8)
        body = content[:wanted] if n < 10_000 and rng.random() < 0.8 else content[:-4]
        body = body.ljust(wanted, b"\xff") if n < 10_000 else body
        return {"a.record": body + struct.pack("<I", zlib.crc32(body))}
    return case


def _read_records(folder: Path) -> None:
    from ringjax.data.config import DataConfig, SourceConfig
    from ringjax.data.records import RecordReader, RecordSource
    from ringjax.data.tokenizers import ByteTokenizer

    reader = RecordReader(folder)
    source = RecordSource(SourceConfig(str(folder)), DataConfig(tokenizer="bytes"), ByteTokenizer())
    indices = range(min(len(reader), 20))
    _all([reader.verify, *(lambda i=i: source.read(i) for i in indices)], (DataError,))


def _finish_records(rng: random.Random, case: Case) -> Case:
    """Sizes and checksums in meta.json that fit the shards, most of the time."""
    if rng.random() < 0.15:
        return case
    try:
        meta = json.loads(case["meta.json"])
        for shard in meta["shards"]:
            content = case[shard["file"]]
            shard["bytes"], shard["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        return {**case, "meta.json": json.dumps(meta).encode()}
    except (ValueError, KeyError, TypeError, RecursionError):
        return case


def _read_picture(folder: Path) -> None:
    from ringjax.data.pictures import count_frames, open_picture, read_frame, read_frames

    (file,) = folder.iterdir()
    reads = [
        lambda: count_frames(file),
        lambda: open_picture(file, 1),
        lambda: read_frame(file, count_frames(file) - 1, 16),
    ]
    reads += [lambda fit=fit: read_frames(file, 32, fit=fit) for fit in ("crop", "pad", "centre")]
    _all(reads, (DataError,))


def _read_picture_set(folder: Path) -> None:
    from ringjax.data.picture_set import DecodedSet, LeftOut, PictureForm, PictureSet, list_files

    form = PictureForm(16, 3, "crop", "white")
    left_out = LeftOut("skip")
    files = list_files(folder / "captions.jsonl", "train", 0.0, left_out)
    for kind in (PictureSet, DecodedSet):
        made = kind(files, form, left_out)
        if len(made):
            made[[0, len(made) - 1]]


def _read_config(folder: Path) -> None:
    from ringjax.training.config import RunConfig
    from ringjax.training.load import check_devices, load_run, to_yaml

    run = load_run(folder / "config.yaml")
    to_yaml(run)
    if isinstance(run, RunConfig):
        with contextlib.suppress(ConfigError):  # speaks of the stage: the config was read
            check_devices(run, 8, simulated=True)


def _read_tokenizer(folder: Path) -> None:
    from ringjax.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode(_TEXT)
    tokenizer.decode(ids[:50])
    tokenizer.decode([0, 1, tokenizer.vocab_size - 1])
    tokenizer.marker("<vision>")


def _read_template(folder: Path) -> None:
    from ringjax.inference.chat_template import ChatTemplate

    text = (folder / "template.jinja").read_bytes().decode("utf-8", "replace")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages)


def _read_gguf(folder: Path) -> None:
    from ringjax.interop.published import open_published

    published = open_published(folder / "model.gguf")
    published.load()


def _read_gguf_tokenizer(folder: Path) -> None:
    from ringjax.data.tokenizers import load_tokenizer
    from ringjax.interop.gguf import GgufSource, gguf_config

    file = folder / "model.gguf"

    def tensors() -> None:
        source = GgufSource(file)
        for name, shape in source.shapes.items():
            source.read(name, tuple(slice(0, min(size, 40)) for size in shape))
        gguf_config(source)

    _all([lambda: load_tokenizer(str(file)).encode(_TEXT), tensors], ERRORS)


def _read_safetensors(folder: Path) -> None:
    from ringjax.interop.tensors import SafetensorsSource

    source = SafetensorsSource(folder)
    for name, shape in source.shapes.items():
        source.read(name, tuple(slice(None) for _ in shape))


def _read_vqgan(folder: Path) -> None:
    from ringjax.data.codes import tokenizer_fingerprint

    tokenizer_fingerprint(str(folder / "vqgan.safetensors"))


def _read_vqmodel(folder: Path) -> None:
    from ringjax.interop.vqgan import load_vqmodel

    load_vqmodel(folder, 16)


def _read_pickle(folder: Path) -> None:
    from ringjax.interop.pickled import load_vqgan_pickle, read_pickled_arrays

    path = folder / "vqgan.pickle"
    found = read_pickled_arrays(path)
    if len(found) > 2:
        load_vqgan_pickle(path, seeds.vqgan_config())


def _read_lwm(folder: Path) -> None:
    from ringjax.interop.start import open_start
    from ringjax.models.parallel import Parallel

    start = open_start(str(folder / "stream.msgpack"), 4)
    start.load(start.config, Parallel())


def _read_lwm_index(folder: Path) -> None:
    from ringjax.interop.lwm import LwmSource, shape_of_stream

    source = LwmSource(folder / "stream.msgpack")
    for name, shape in source.shapes.items():
        source.read(name, tuple(slice(0, min(size, 40)) for size in shape))
    shape_of_stream(source, 4)


def _read_hf_config(folder: Path) -> None:
    from ringjax.interop.hf import read_description

    read_description(folder)


def _read_hf(folder: Path) -> None:
    from ringjax.inference.text_model import TextModel

    model = TextModel.load(folder)
    if model.template is not None:
        model.template.render([{"role": "user", "content": "hello"}])


def _read_llava(folder: Path) -> None:
    from ringjax.interop.llava import load_llava

    load_llava(folder)


def _read_llava_config(folder: Path) -> None:
    from ringjax.interop.llava import read_folder_preprocessing, read_llava

    read_folder_preprocessing(folder, read_llava(folder).config)


def _read_peft(folder: Path) -> None:
    from ringjax.interop.hf_config import read_hf_config
    from ringjax.interop.peft import Adapter
    from tests.inference.published import VOCAB
    from tests.interop import families

    adapter = Adapter.read(folder)
    config = read_hf_config({**families.FAMILIES["tied"], "vocab_size": VOCAB, "tie_word_embeddings": False}).config
    adapter.params(dataclasses.replace(config, **adapter.changes))


def _read_release(folder: Path) -> None:
    from ringjax.data.codes import tokenizer_fingerprint
    from ringjax.data.tokenizers import load_tokenizer
    from ringjax.interop.release import load_release

    released = load_release(folder)
    load_tokenizer(released.data.tokenizer)
    tokenizer_fingerprint(released.data.vision_tokenizer)


def _read_checkpoint(folder: Path) -> None:
    from ringjax.interop.runs import Checkpoint

    Checkpoint.find(folder).load()


def _read_manifest(folder: Path) -> None:
    from ringjax.training.checkpoint import run_of
    from ringjax.training.manifest import digest_of, read_manifest

    info = read_manifest(folder)
    digest_of(folder)
    run_of(info, folder)


def sealed(case: Case, start: str, listed: bool = False) -> Case:
    """The case with a manifest whose checksums fit; `listed`: every file is in it, and no other."""
    name = f"{start}ringjax.json"
    _, _, body = case[name].partition(b"\n")
    try:
        info = json.loads(body)
        files = {
            path.removeprefix(start): content
            for path, content in case.items()
            if path.startswith(start) and path != name
        }
        if listed:
            info["files"] = {}
        for path, content in files.items():
            if listed or path in info["files"]:
                info["files"][path] = [len(content), hashlib.sha256(content).hexdigest()]
        body = json.dumps(info).encode()
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        pass
    return {**case, name: json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body}


def _finish_manifest(start: str) -> Callable[[random.Random, Case], Case]:
    def finish(rng: random.Random, case: Case) -> Case:
        name = f"{start}ringjax.json"
        if rng.random() < 0.1 or name not in case:
            return case
        case = sealed(case, start)
        if rng.random() < 0.5:  # what the manifest says is another thing, under a checksum that fits
            first, _, body = case[name].partition(b"\n")
            body = formats.changed(rng, "ringjax.json", body, [body])
            case[name] = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body
        return case

    return finish


def _read_results(folder: Path) -> None:
    from ringjax.evaluation.results import Results
    from ringjax.evaluation.summary import markdown, summarise

    with Results(folder, {"a": (1, 2)}, {}) as results:
        markdown(summarise(results.records))


def _read_metrics(folder: Path) -> None:
    from ringjax.training.metrics import read_metrics, truncate_metrics

    read_metrics(folder / "metrics.jsonl")
    truncate_metrics(folder / "metrics.jsonl", 20)


def _read_texts(folder: Path) -> None:
    from ringjax.evaluation.haystack import read_texts
    from ringjax.evaluation.ruler_qa import read_passages

    (file,) = folder.iterdir()
    if file.suffix != ".gz":
        _all([lambda: read_texts(str(file)), lambda: read_passages(file)], ERRORS)
    else:
        read_texts(str(file))


# --- all of them ----------------------------------------------------------------------------------------------------

_CHECKPOINT = (*ERRORS, DamagedCheckpoint)


def _targets() -> list[Target]:
    from ringjax.training.checkpoint import CheckpointError

    return [
        Target(
            "jsonl",
            seeds.jsonl,
            _read_jsonl,
            words=("fields", "vision", "[a],b", '"', '"a"+b', "<|bos|>", "<|eos|>", "a+b", "[", "]"),
        ),
        Target("record", seeds.record, _read_record, finish=_finish_record),
        Target(
            "records",
            seeds.records,
            _read_records,
            finish=_finish_records,
            words=("shards", "file", "00000.array_record"),
        ),
        Target("pictures", seeds.pictures, _read_picture),
        Target(
            "picture_set",
            seeds.picture_set,
            _read_picture_set,
            words=("file", "a.png", "b.gif", "../a.png", "/dev/zero", "/etc/hostname"),
        ),
        Target(
            "config",
            seeds.config,
            _read_config,
            words=("model", "heads", "vqgan", "stages", "size", "lora", "init_from", "rope_scaling"),
        ),
        Target(
            "tokenizer",
            seeds.tokenizer,
            _read_tokenizer,
            words=("model", "vocab", "merges", "Regex", "(a+)+$", "BPE", "Unigram", "type", "Sequence", "id"),
        ),
        Target("sentencepiece", seeds.sentencepiece, _read_tokenizer),
        Target("template", seeds.template, _read_template, names=("chat template",)),
        Target("gguf", seeds.gguf, _read_gguf),
        Target(
            "gguf_header",
            seeds.gguf,
            _read_gguf_tokenizer,
            words=("llama.block_count", "blk.999999999.attn_norm.weight"),
        ),
        Target("safetensors", seeds.safetensors, _read_safetensors),
        Target("vqgan", seeds.vqgan, _read_vqgan),
        Target("vqmodel", seeds.vqmodel, _read_vqmodel),
        Target("pickle", seeds.pickled, _read_pickle),
        Target("lwm", seeds.lwm, _read_lwm_index),
        Target("lwm_model", seeds.lwm, _read_lwm),
        Target(
            "hf_config",
            seeds.hf_config,
            _read_hf_config,
            words=("rope_scaling", "rope_parameters", "layer_types", "eos_token_id", "head_dim", "yarn", "llama3"),
        ),
        Target("hf", seeds.hf, _read_hf, names=("chat template",)),
        Target(
            "llava_config",
            seeds.llava_config,
            _read_llava_config,
            words=("text_config", "vision_config", "size", "crop_size", "resample"),
        ),
        Target("llava", seeds.llava, _read_llava),
        Target("peft", seeds.peft, _read_peft),
        Target("release", seeds.release, _read_release),
        Target(
            "checkpoint",
            seeds.checkpoint,
            _read_checkpoint,
            (*_CHECKPOINT, CheckpointError),
            finish=_finish_manifest("checkpoints/step_00000002/"),
        ),
        Target(
            "manifest", seeds.manifest, _read_manifest, (*_CHECKPOINT, CheckpointError), finish=_finish_manifest("")
        ),
        Target("results", seeds.results, _read_results),
        Target("metrics", seeds.metrics, _read_metrics),
        Target("texts", seeds.texts, _read_texts),
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
