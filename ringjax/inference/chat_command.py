"""`ringjax chat MODEL`: a conversation in the terminal."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import jax

from ringjax.inference.on_mesh import OnMesh
from ringjax.inference.sampling import Sampling
from ringjax.inference.session import Session
from ringjax.inference.text_model import TextModel
from ringjax.models.cache import CacheType

HELP = "/reset begins anew, /exit (or Ctrl-D) ends"


@dataclasses.dataclass(frozen=True)
class ChatConfig(OnMesh):
    """Talk to a published model; the conversation stays in its cache from turn to turn."""

    model: str
    """A Hugging Face folder, a .gguf file, or the folder of a run of `ringjax train`."""
    stage: str | None = None
    """Of a run: the stage whose last checkpoint is talked to; null: the last."""
    adapter: str | None = None
    """A folder with a LoRA adapter in PEFT's form, or `sample:smollm2-128k`, merged into the model; null: none."""
    system: str | None = None
    """What the model is told before the first turn; null: what its template says."""
    template: str | None = None
    """chatml, lwm, or a file with a chat template; null: the model's own."""
    context: int | None = None
    """Tokens of the conversation at most; null: what the model was trained for."""
    max_new_tokens: int = 512
    """Tokens of an answer at most."""
    temperature: float = 0.2
    """Logits are divided by it; 0: always the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Only tokens at least this likely, as a share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Tokens of the conversation so far become less likely above 1."""
    stop: str | None = None
    """Text that ends an answer; it is not shown."""
    stop_tokens: tuple[str, ...] = ()
    """Special tokens that end an answer too, such as <|im_end|>; the option may be repeated."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights, cache and products; null: bfloat16, but float32 on CPUs."""
    cache: CacheType | None = None
    """int8: keys and values in half of bfloat16's memory, a little less exact; null: as the dtype says."""
    seed: int = 0
    """Of the random numbers."""

    def __post_init__(self):
        self.check_mesh()
        for name in ("context", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.stop == "":
            raise ValueError("stop '' would end every answer at once; give some text, or leave it out")
        self.sampling()

    def sampling(self) -> Sampling:
        """The settings for sampling."""
        return Sampling(
            self.temperature, self.top_k, self.top_p, min_p=self.min_p, seed=self.seed,
            repetition_penalty=self.repetition_penalty,
        )  # fmt: skip


def run_chat(
    config: ChatConfig, lines: Iterable[str] | None = None, write: Callable[[str], None] | None = None
) -> None:
    """Answers each of `lines` (None: what people type) until they end, or `/exit`."""
    write = write or _write
    parallel = config.parallel()
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"ringjax chat in {jax.process_count()} processes: what is typed reaches only one of them; start"
            " one process, or use ringjax generate, which takes its prompt from all"
        )
    model = TextModel.load(
        config.model, parallel=parallel, dtype=config.dtype, template=config.template, stage=config.stage,
        adapter=config.adapter,
    )  # fmt: skip
    model.chat_ids([{"role": "user", "content": ""}])  # whether it can chat at all, before anybody types
    model.stops_of(config.stop_tokens)
    session = model.session(config.context, cache_type=config.cache)
    write(f"{config.model}: a context of {session.capacity} tokens; {HELP}\n")
    write(_about_context(config, model, session.capacity))
    messages = beginning = [{"role": "system", "content": config.system}] if config.system else []
    for line in _typed() if lines is None else lines:
        line = line.strip()
        if line == "/exit":
            return
        if line == "/reset":
            messages = beginning
        elif line:
            messages = _turn(config, model, session, [*messages, {"role": "user", "content": line}], write)


def _about_context(config: ChatConfig, model: TextModel, capacity: int) -> str:
    """A line where the context is not what the model was trained for."""
    if config.context is not None and config.context > model.context:
        return f"(the model was trained for {model.context} tokens; what it says past them may make little sense)\n"
    if config.context is None and capacity < model.context:
        return f"(of the {model.context} tokens that the model was trained for, the cache of these fits into memory)\n"
    return ""


def _turn(config: ChatConfig, model: TextModel, session: Session, messages: list, write: Callable[[str], None]) -> list:
    """The conversation with the answer; unchanged but for the question, which is taken back, where it can't be had."""
    try:
        ids = model.chat_ids(messages)
        pieces = model.write(
            session, ids, max_new_tokens=config.max_new_tokens, sampling=config.sampling(),
            stops=() if config.stop is None else (config.stop,), stop_tokens=config.stop_tokens,
        )  # fmt: skip
        answer, times = "", []
        for piece in pieces:
            answer += piece
            times.append(time.perf_counter())
            write(piece)
    except ValueError as error:  # too long, or the text of a special token: the conversation goes on without it
        write(f"({error})\n")
        return messages[:-1]
    new = len(session.ids) - len(ids)
    speed = f"{new / (times[-1] - times[0]):.1f} tokens/s, " if len(times) > 1 and new > 0 else ""
    full = ", the context is full: /reset" if len(session.ids) >= session.capacity else ""
    write(f"\n[{new + 1} tokens, {speed}context {len(session.ids)} of {session.capacity}{full}]\n")
    return [*messages, {"role": "assistant", "content": answer}]


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _write(text: str) -> None:
    print(text, end="", flush=True)
