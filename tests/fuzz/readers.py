"""The library's readers, each on the folder of one input: what it opens it reads, and what it gives is used once."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

from ringjax.data.errors import DataError, MissingShard
from ringjax.training.yaml_tree import ConfigError
from tests.fuzz import seeds_models

ERRORS = (ValueError, DataError, MissingShard, ConfigError, FileNotFoundError, NotImplementedError)
_TEXT = "Hello there, 123 é 漢字 <|im_start|>\n\tabc cab\0"


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


def read_jsonl(folder: Path) -> None:
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


def read_record(folder: Path) -> None:
    from ringjax.data.records import decode_record

    decode_record((folder / "a.record").read_bytes(), str(folder / "a.record"))


def read_records(folder: Path) -> None:
    from ringjax.data.config import DataConfig, SourceConfig
    from ringjax.data.records import RecordReader, RecordSource
    from ringjax.data.tokenizers import ByteTokenizer

    reader = RecordReader(folder)
    source = RecordSource(SourceConfig(str(folder)), DataConfig(tokenizer="bytes"), ByteTokenizer())
    indices = range(min(len(reader), 20))
    _all([reader.verify, *(lambda i=i: source.read(i) for i in indices)], (DataError,))


def read_picture(folder: Path) -> None:
    from ringjax.data.pictures import count_frames, open_picture, read_frame, read_frames

    (file,) = folder.iterdir()
    reads = [
        lambda: count_frames(file),
        lambda: open_picture(file, 1),
        lambda: read_frame(file, count_frames(file) - 1, 16),
    ]
    reads += [lambda fit=fit: read_frames(file, 32, fit=fit) for fit in ("crop", "pad", "centre")]
    _all(reads, (DataError,))


def read_picture_set(folder: Path) -> None:
    from ringjax.data.picture_set import DecodedSet, LeftOut, PictureForm, PictureSet, list_files

    form = PictureForm(16, 3, "crop", "white")
    left_out = LeftOut("skip")
    files = list_files(folder / "captions.jsonl", "train", 0.0, left_out)
    for kind in (PictureSet, DecodedSet):
        made = kind(files, form, left_out)
        if len(made):
            made[[0, len(made) - 1]]


def read_config(folder: Path) -> None:
    from ringjax.training.config import RunConfig
    from ringjax.training.load import check_devices, load_run, to_yaml

    run = load_run(folder / "config.yaml")
    to_yaml(run)
    if isinstance(run, RunConfig):
        with contextlib.suppress(ConfigError):  # speaks of the stage: the config was read
            check_devices(run, 8, simulated=True)


def read_tokenizer(folder: Path) -> None:
    from ringjax.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode(_TEXT)
    tokenizer.decode(ids[:50])
    tokenizer.decode([0, 1, tokenizer.vocab_size - 1])
    tokenizer.marker("<vision>")


def read_template(folder: Path) -> None:
    from ringjax.inference.chat_template import ChatTemplate

    text = (folder / "template.jinja").read_bytes().decode("utf-8", "replace")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages)


def read_gguf(folder: Path) -> None:
    from ringjax.interop.published import open_published

    published = open_published(folder / "model.gguf")
    published.load()


def read_gguf_tokenizer(folder: Path) -> None:
    from ringjax.data.tokenizers import load_tokenizer
    from ringjax.interop.gguf import GgufSource, gguf_config

    file = folder / "model.gguf"

    def tensors() -> None:
        source = GgufSource(file)
        for name, shape in source.shapes.items():
            source.read(name, tuple(slice(0, min(size, 40)) for size in shape))
        gguf_config(source)

    _all([lambda: load_tokenizer(str(file)).encode(_TEXT), tensors], ERRORS)


def read_safetensors(folder: Path) -> None:
    from ringjax.interop.tensors import SafetensorsSource

    source = SafetensorsSource(folder)
    for name, shape in source.shapes.items():
        source.read(name, tuple(slice(None) for _ in shape))


def read_vqgan(folder: Path) -> None:
    from ringjax.data.codes import tokenizer_fingerprint

    tokenizer_fingerprint(str(folder / "vqgan.safetensors"))


def read_vqmodel(folder: Path) -> None:
    from ringjax.interop.vqgan import load_vqmodel

    load_vqmodel(folder, 16)


def read_pickle(folder: Path) -> None:
    from ringjax.interop.pickled import load_vqgan_pickle, read_pickled_arrays

    path = folder / "vqgan.pickle"
    found = read_pickled_arrays(path)
    if len(found) > 2:
        load_vqgan_pickle(path, seeds_models.vqgan_config())


def read_lwm(folder: Path) -> None:
    from ringjax.interop.start import open_start
    from ringjax.models.parallel import Parallel

    start = open_start(str(folder / "stream.msgpack"), 4)
    start.load(start.config, Parallel())


def read_lwm_index(folder: Path) -> None:
    from ringjax.interop.lwm import LwmSource, shape_of_stream

    source = LwmSource(folder / "stream.msgpack")
    for name, shape in source.shapes.items():
        source.read(name, tuple(slice(0, min(size, 40)) for size in shape))
    shape_of_stream(source, 4)


def read_hf_config(folder: Path) -> None:
    from ringjax.interop.hf import read_description

    read_description(folder)


def read_hf(folder: Path) -> None:
    from ringjax.inference.text_model import TextModel

    model = TextModel.load(folder)
    if model.template is not None:
        model.template.render([{"role": "user", "content": "hello"}])


def read_llava(folder: Path) -> None:
    from ringjax.interop.llava import load_llava

    load_llava(folder)


def read_llava_config(folder: Path) -> None:
    from ringjax.interop.llava import read_folder_preprocessing, read_llava

    read_folder_preprocessing(folder, read_llava(folder).config)


def read_peft(folder: Path) -> None:
    from ringjax.interop.hf_config import read_hf_config
    from ringjax.interop.peft import Adapter
    from tests.inference.published import VOCAB
    from tests.interop import families

    adapter = Adapter.read(folder)
    config = read_hf_config({**families.FAMILIES["tied"], "vocab_size": VOCAB, "tie_word_embeddings": False}).config
    adapter.params(dataclasses.replace(config, **adapter.changes))


def read_release(folder: Path) -> None:
    from ringjax.data.codes import tokenizer_fingerprint
    from ringjax.data.tokenizers import load_tokenizer
    from ringjax.interop.release import load_release

    released = load_release(folder)
    load_tokenizer(released.data.tokenizer)
    tokenizer_fingerprint(released.data.vision_tokenizer)


def read_checkpoint(folder: Path) -> None:
    from ringjax.interop.runs import Checkpoint

    Checkpoint.find(folder).load()


def read_manifest(folder: Path) -> None:
    from ringjax.training.checkpoint import run_of
    from ringjax.training.manifest import digest_of, read_manifest

    info = read_manifest(folder)
    digest_of(folder)
    run_of(info, folder)


def read_results(folder: Path) -> None:
    from ringjax.evaluation.results import Results
    from ringjax.evaluation.summary import markdown, summarise

    with Results(folder, {"a": (1, 2)}, {}) as results:
        markdown(summarise(results.records))


def read_metrics(folder: Path) -> None:
    from ringjax.training.metrics import read_metrics, truncate_metrics

    read_metrics(folder / "metrics.jsonl")
    truncate_metrics(folder / "metrics.jsonl", 20)


def read_texts(folder: Path) -> None:
    from ringjax.evaluation.haystack import read_texts
    from ringjax.evaluation.ruler_qa import read_passages

    (file,) = folder.iterdir()
    if file.suffix != ".gz":
        _all([lambda: read_texts(str(file)), lambda: read_passages(file)], ERRORS)
    else:
        read_texts(str(file))
