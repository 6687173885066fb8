"""The options of `ringjax eval`."""

import dataclasses
from typing import Literal

from ringjax.attention import layouts, strategies
from ringjax.attention.kernels import check_name
from ringjax.evaluation.methods import Method, MethodOptions
from ringjax.evaluation.retrieval import Chunks
from ringjax.evaluation.ruler import TASKS
from ringjax.training.mesh import check_shape


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What every evaluation is told."""

    model: str
    """A Hugging Face folder, a .gguf file, or the folder of a run of `ringjax train`."""
    stage: str | None = None
    """Of a run: the stage whose last checkpoint is asked; null: the last."""
    adapter: str | None = None
    """A folder with a LoRA adapter in PEFT's form, or `sample:smollm2-128k`, merged into the model; null: none."""
    output: str = "runs/eval"
    """Folder for results.jsonl, pictures and report; an evaluation that was interrupted goes on there."""
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens of a prompt (of a row, for perplexity)."""
    method: tuple[Method, ...] = ("exact",)
    """exact; ntk, yarn, linear (RoPE stretched); window, sinks (approximate); flat, hnsw, lsh (retrieval)."""
    haystack: str | None = None
    """A text file, a .jsonl with `text`, or a folder of them; null: the novels that travel with ringjax."""
    repeat_haystack: bool = False
    """Whether a haystack that is too short begins anew."""
    window: int = 1024
    """Tokens that methods window and sinks see behind themselves."""
    sinks: int = 4
    """First tokens that method sinks always sees."""
    rope_theta: float | None = None
    """RoPE's base, for every method; null: the model's."""
    rope_scaling: Literal["yarn", "linear"] | None = None
    """RoPE's rule, for every method; null: the model's."""
    rope_factor: float | None = None
    """Of rope_scaling and of methods ntk, yarn and linear; null: for the methods as much as a length needs."""
    allow_beyond: bool = False
    """Whether lengths beyond the model's context are asked as it is."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights, cache and products; null: bfloat16, but float32 on CPUs."""
    mesh: str | None = None
    """Devices along dp,fsdp,tp,sp, one of them may be -1; null: one device."""
    layout: Literal["contiguous", "striped", "zigzag"] = "striped"
    """Which token sits on which device of the ring."""
    strategy: Literal["ring", "two_level", "all_gather", "ulysses", "hybrid"] = "ring"
    """How attention crosses the devices of the ring."""
    host_size: int | None = None
    """Devices of the ring that share fast links, for two_level and hybrid; null: those of a process, or TPU slice."""
    backend: str = "auto"
    """The attention kernel."""
    simulated_devices: int = 0
    """CPU devices to simulate where there is no accelerator, 0: none."""
    seed: int = 0
    """Of the questions."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """What is shown meanwhile: a bar on a terminal, lines elsewhere."""

    def __post_init__(self):
        _require(bool(self.lengths) and min(self.lengths) >= 2, f"lengths {self.lengths} must be numbers of at least 2")
        _require(bool(self.method), "method: name at least one")
        for name in ("lengths", "method"):
            given = getattr(self, name)
            _require(len(set(given)) == len(given), f"{name} {' '.join(map(str, given))}: each once")
        _require(self.window >= 1, f"window {self.window} must be at least 1")
        _require(self.sinks >= 0, f"sinks {self.sinks} must be 0 or more")
        _require(self.seed >= 0, f"seed {self.seed} must be 0 or more")
        _require(self.simulated_devices >= 0, f"simulated_devices {self.simulated_devices} must be 0 or more")
        self._check_rope()
        check_name(self.backend)
        layouts.get(self.layout)
        strategies.check_name(self.strategy)
        strategies.check_host_size(self.strategy, self.host_size)
        if self.mesh is not None:
            check_shape(self.mesh)

    def _check_rope(self) -> None:
        stretched = [name for name in self.method if name in ("ntk", "yarn", "linear")]
        if self.rope_scaling is not None:
            _require(self.rope_factor is not None, f"rope_scaling {self.rope_scaling} needs --rope_factor, such as 4")
        if self.rope_factor is not None:
            _require(self.rope_factor >= 1, f"rope_factor {self.rope_factor} must be at least 1")
            _require(
                bool(stretched or self.rope_scaling),
                f"rope_factor {self.rope_factor} says how far, not how: add --rope_scaling, or --method ntk or yarn",
            )
        if stretched and (self.rope_scaling is not None or self.rope_theta is not None):
            raise ValueError(f"method {stretched[0]} changes RoPE itself; leave out --rope_theta and --rope_scaling")

    def options(self) -> MethodOptions:
        """For the methods."""
        return MethodOptions(self.window, self.sinks, self.rope_factor, allow_beyond=self.allow_beyond)


@dataclasses.dataclass(frozen=True)
class QuestionConfig(EvalConfig):
    """What evaluations with questions are told."""

    template: str = "lwm"
    """lwm (its needle prompt), chat (the model's own chat template), none, chatml, or a file with a template."""
    max_new_tokens: int | None = None
    """Tokens of an answer at most; null: as the task needs."""
    chunk_tokens: int = 128
    """Retrieval: tokens of a chunk."""
    overlap: int = 32
    """Retrieval: tokens that a chunk shares with the one before."""
    top: int = 8
    """Retrieval: chunks that are read."""
    embed: str = "model"
    """Retrieval: `model` (its last hidden states), or the name or folder of a sentence-transformers model."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_new_tokens is not None:
            _require(self.max_new_tokens >= 1, f"max_new_tokens {self.max_new_tokens} must be at least 1")
        self.options()

    def options(self) -> MethodOptions:
        """For the methods."""
        chunks = Chunks(self.chunk_tokens, self.overlap, self.top)
        return dataclasses.replace(super().options(), chunks=chunks, embed=self.embed)


@dataclasses.dataclass(frozen=True)
class NeedleConfig(QuestionConfig):
    """Needle in a haystack: is a number found, at which length and depth?"""

    output: str = "runs/eval_needle"
    """Folder for results.jsonl, pictures and report; an evaluation that was interrupted goes on there."""
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    """Percent of the context before the needle."""
    per_cell: int = 1
    """Questions at each length and depth."""
    needles: int = 1
    """N, needles in a context."""
    retrieve: int = 1
    """R, how many of them are asked."""
    digits: int = 7
    """Of a number."""
    score: Literal["answer", "likelihood"] = "answer"
    """answer: the number is in what the model writes; likelihood: each of its digits is the likeliest token."""

    def __post_init__(self):
        super().__post_init__()
        _require(
            bool(self.depths) and all(0 <= depth <= 100 for depth in self.depths),
            f"depths {self.depths} must be percents, 0 to 100",
        )
        _require(self.per_cell >= 1, f"per_cell {self.per_cell} must be at least 1")
        _require(1 <= self.digits <= 18, f"digits {self.digits} must be 1 to 18")


@dataclasses.dataclass(frozen=True)
class RulerConfig(QuestionConfig):
    """RULER: needles of many kinds, variable tracking, common and frequent words, answers from paragraphs."""

    output: str = "runs/eval_ruler"
    """Folder for results.jsonl, pictures and report; an evaluation that was interrupted goes on there."""
    tasks: tuple[str, ...] = TASKS
    """Which of them."""
    per_task: int = 5
    """Questions of each task at each length."""
    qa: str | None = None
    """JSONL of {context, question, answers} for task qa; null: questions made from the haystack."""

    def __post_init__(self):
        super().__post_init__()
        unknown = next((task for task in self.tasks if task not in TASKS), None)
        _require(unknown is None, f"task {unknown!r} is unknown; there are {', '.join(TASKS)}")
        _require(bool(self.tasks) and self.per_task >= 1, "name at least one task, and per_task of at least 1")


@dataclasses.dataclass(frozen=True)
class PerplexityConfig(EvalConfig):
    """Perplexity by position: does a longer context help, and where does it break?"""

    output: str = "runs/eval_perplexity"
    """Folder for results.jsonl, pictures and report; an evaluation that was interrupted goes on there."""
    rows: int = 8
    """Rows of each length at most; none crosses the end of a document."""
    buckets: int = 16
    """Parts of a row, of equal size, whose losses are averaged."""

    def __post_init__(self):
        super().__post_init__()
        _require(self.rows >= 1, f"rows {self.rows} must be at least 1")
        _require(1 <= self.buckets <= min(self.lengths), f"buckets {self.buckets} must be 1 to the shortest length")
        wrong = next((name for name in self.method if name in ("flat", "hnsw", "lsh")), None)
        _require(wrong is None, f"method {wrong}: retrieval answers questions; perplexity needs the whole text")
