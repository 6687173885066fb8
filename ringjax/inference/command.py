"""`ringjax generate MODEL`: text after text, words about pictures, pictures from words, and both in one stream.

What people see is written as it comes where a model streams (published ones), and else when it is there.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ringjax.data.pictures import is_clip
from ringjax.inference.generate_config import GenerateConfig
from ringjax.inference.pictures_out import free_name, write_frames
from ringjax.interop.tensors import read_json
from ringjax.training import distributed

Write = Callable[[str], None]
_OF_STREAMS = ("tokenizer", "rope_theta", "heads")


def run_generate(config: GenerateConfig, write: Write | None = None) -> None:
    """Do what the config asks, and say it with `write` (None: to the terminal).

    Raises ValueError for a wrong or damaged picture and for what the model cannot do, FileNotFoundError for a folder
    without a run.
    """
    from ringjax.interop.published import is_published

    write = write or (lambda text: print(text, end="", flush=True) if distributed.is_main() else None)
    if is_published(config.run_dir):
        _published(config, write)
    else:
        _run(config, write)


def _published(config: GenerateConfig, write: Write) -> None:
    """By a published model: one of text, or a LLaVA, told apart by what is in its folder."""
    file = Path(config.run_dir) / "config.json"
    sees = file.is_file() and read_json(file).get("model_type") == "llava"
    (_see if sees else _continue)(config, write)


def _see(config: GenerateConfig, write: Write) -> None:
    """What a LLaVA says about pictures, in its own turns."""
    from ringjax.inference.llava_model import LlavaModel

    away = "is a LLaVA, which answers about pictures and has settings of its own for them"
    unused = "draw", "interleaved", "image_tokenizer", "max_frames", "fit", "stop", "stop_tokens", "cache"
    _refuse(config, unused, away)
    _refuse(config, _OF_STREAMS, "is no LWM stream and has its own")
    _refuse(config, ("stage",), "is no run, which has stages")
    _refuse(config, ("adapter",), "is a LLaVA; adapters are for models of text")
    if config.prompt_form != "own" or config.repetition_penalty != 1:
        name = "prompt_form" if config.prompt_form != "own" else "repetition_penalty"
        raise NotImplementedError(f"--{name} {getattr(config, name)}: {config.run_dir} {away}; leave it out")
    for path in config.image:
        if is_clip(path):
            raise NotImplementedError(
                f"{path} is a clip, and {config.run_dir} {away}: give its frames one by one, --image for each"
            )
    model = LlavaModel.load(config.run_dir, parallel=config.parallel())
    options = dict(max_new_tokens=config.new_tokens, sampling=config.sampling())
    write(model.answer(config.image, config.text(), **options) + "\n")


def _run(config: GenerateConfig, write: Write) -> None:
    from ringjax.inference.lwm_stream import SUFFIX, load_stream
    from ringjax.inference.trained import TrainedRun

    if config.stop is not None:
        raise ValueError(
            f"stop {config.stop!r} is for published models; a run's answers end at its end token and --stop_tokens"
        )
    if config.cache is not None:
        raise NotImplementedError(f"--cache {config.cache} is for published models of text; leave it out")
    options = dict(
        image_tokenizer=config.image_tokenizer, prompt_form=config.prompt_form, parallel=config.parallel()
    )  # fmt: skip
    _refuse(config, ("adapter",), "is no published model of text; a run of adapters knows its own")
    if Path(config.run_dir).suffix == SUFFIX:
        _refuse(config, ("stage",), "is no run, which has stages")
        stream = dict(tokenizer=config.tokenizer, rope_theta=config.rope_theta, heads=config.heads)
        run = load_stream(config.run_dir, **stream, **options)
    else:
        _refuse(config, _OF_STREAMS, "is no LWM stream and has its own")
        run = TrainedRun.load(config.run_dir, stage=config.stage, **options)
    task = _draw if config.draw is not None else _interleave if config.interleaved else _answer
    task(run, config, write)


def _continue(config: GenerateConfig, write: Write) -> None:
    """Text by a published model, after the prompt as it is (a chat template is `ringjax chat`'s) or in LWM's form."""
    from ringjax.inference.text_model import TextModel

    away = "is a model of text; pictures need a LLaVA, or a run of `ringjax train` or LWM stream that knows them"
    _refuse(config, ("image", "draw", "interleaved", "image_tokenizer"), away)
    _refuse(config, _OF_STREAMS, "is no LWM stream and has its own")
    _refuse(config, ("stage",), "is no run, which has stages")
    prompt, lwm = config.text(), config.prompt_form == "lwm"
    options = dict(template="lwm" if lwm else None, adapter=config.adapter)
    model = TextModel.load(config.run_dir, parallel=config.parallel(), **options)
    ids = model.chat_ids([{"role": "user", "content": prompt}]) if lwm else model.vocabulary.prompt(prompt)
    if not ids:
        raise ValueError("the prompt has no tokens; give some words")
    session = model.session(
        len(ids) + config.new_tokens, option="a shorter prompt or --max_new_tokens", cache_type=config.cache
    )
    pieces = model.write(
        session, ids, max_new_tokens=config.new_tokens, sampling=config.sampling(),
        stops=() if config.stop is None else (config.stop,), stop_tokens=config.stop_tokens,
    )  # fmt: skip
    write("" if lwm else prompt)
    for piece in pieces:
        write(piece)
    write("\n")


def _refuse(config: GenerateConfig, names: tuple[str, ...], why: str) -> None:
    """Raises NotImplementedError for options that would be ignored."""
    for name in names:
        if getattr(config, name):
            raise NotImplementedError(f"--{name}: {config.run_dir} {why}; leave it out")


def _answer(run, config: GenerateConfig, write: Write) -> None:
    """Text after text, or after pictures and text."""
    options = dict(
        max_new_tokens=config.new_tokens, sampling=config.sampling(), stop_tokens=config.stop_tokens
    )  # fmt: skip
    prompt = config.text()
    if config.image:
        write(run.answer(_clips(run, config), prompt=prompt, **options).strip() + "\n")
    else:
        written = run.continue_text([prompt], **options)[0]
        write((written.strip() if config.prompt_form == "lwm" else prompt + written) + "\n")


def _draw(run, config: GenerateConfig, write: Write) -> None:
    codes = run.draw_clips(
        [config.text().strip()], config.frames, sampling=config.sampling(), later=config.later_sampling()
    )
    frames = run.to_pictures(codes[0])
    write(distributed.same_on_all(lambda: write_frames(config.draw, frames, fps=config.fps)) + "\n")


def _interleave(run, config: GenerateConfig, write: Write) -> None:
    """Text to the terminal; a picture or clip as a line that names its file."""
    prompt = config.text()
    parts = run.write(
        [prompt], clips=_clips(run, config), max_new_tokens=config.new_tokens, sampling=config.sampling(),
        vision_sampling=config.vision_sampling(), max_frames=config.max_frames, stop_tokens=config.stop_tokens,
    )[0]  # fmt: skip
    write("" if config.prompt_form == "lwm" else prompt)
    for part in parts:
        if isinstance(part, str):
            write(part)
        else:
            write(f"\n[{distributed.same_on_all(functools.partial(_written, config, run.to_pictures(part)))}]\n")
    write("\n")


def _written(config: GenerateConfig, frames: np.ndarray) -> str:
    return write_frames(free_name(config.output, len(frames)), frames, fps=config.fps)


def _clips(run, config: GenerateConfig) -> list[np.ndarray]:
    """The codes of each --image, a frame a row. Raises ValueError that names a file which is no picture."""
    from ringjax.data.pictures import read_clip

    if not config.image:
        return []
    size, most = run.vqgan.config, config.max_frames or run.data.max_frames
    options = dict(channels=size.channels, fit=config.fit or run.fit, max_frames=most)
    return [run.to_codes(read_clip(path, size.resolution, **options)) for path in config.image]
