"""`ringjax eval needle | ruler | perplexity MODEL`: from options to a report; what is about pictures is handed on."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ringjax.evaluation.eval_config import EvalConfig, NeedleConfig, PerplexityConfig, QuestionConfig, RulerConfig
from ringjax.evaluation.eval_progress import EvalProgress
from ringjax.evaluation.eval_report import write_report
from ringjax.evaluation.haystack import Haystack, read_texts, text_fingerprint
from ringjax.evaluation.methods import Methods
from ringjax.evaluation.needle import NeedleTask
from ringjax.evaluation.perplexity import Losses, cut_rows, record
from ringjax.evaluation.question import CHAT, LWM, NONE, Cell, Form, Task
from ringjax.evaluation.results import Results
from ringjax.evaluation.ruler import RulerTask
from ringjax.evaluation.ruler_qa import read_passages
from ringjax.evaluation.run_questions import check_questions, run_questions
from ringjax.evaluation.summary import markdown, summarise
from ringjax.evaluation.vision_command import VISION_KINDS, run_vision
from ringjax.evaluation.vision_config import VisionConfig
from ringjax.inference.on_mesh import join
from ringjax.inference.text_model import TextModel
from ringjax.inference.vocabulary import Vocabulary
from ringjax.interop.fingerprints import file_facts
from ringjax.interop.published import Published
from ringjax.interop.runs import open_model
from ringjax.models.config import RopeScaling
from ringjax.models.parallel import Parallel
from ringjax.training import distributed
from ringjax.training.mesh import make_mesh

_TEXT_KINDS = {"needle": NeedleConfig, "ruler": RulerConfig, "perplexity": PerplexityConfig}
KINDS: Mapping[str, type[EvalConfig | VisionConfig]] = {**_TEXT_KINDS, **VISION_KINDS}
# What may differ when an evaluation goes on: the grid can grow, and results do not depend on the mesh.
_FREE = (
    "model", "output", "lengths", "method", "haystack", "depths", "per_cell", "per_task", "tasks", "qa", "mesh",
    "layout", "strategy", "host_size", "backend", "simulated_devices", "progress", "rows", "allow_beyond", "template",
    "dtype", "stage", "adapter",
)  # fmt: skip


def run_eval(config: EvalConfig | VisionConfig) -> str:
    """Asks what was not answered yet, writes the report; gives what to print.

    Raises ValueError, FileNotFoundError, NotImplementedError or ImportError before the first question where something
    is wrong or missing.
    """
    if isinstance(config, VisionConfig):
        return run_vision(config)
    join(config, lambda: {"model": _opened(config).fingerprint, **file_facts([config.haystack, config.adapter])})
    texts = read_texts(config.haystack)
    methods = _open_model(config)
    haystack = Haystack.of(texts, methods.model.vocabulary, config.repeat_haystack)
    kind = next(name for name, cls in _TEXT_KINDS.items() if isinstance(config, cls))
    title = f"{kind}: {Path(config.model).stem}"
    asked = {"evaluation": kind, **_asked(config, texts, methods.model)}
    if isinstance(config, QuestionConfig):
        task = _task(config, methods.model, haystack, texts)
        check_questions(task, methods, config.method, config.lengths)
    else:
        for length in config.lengths:
            for name in config.method:
                methods.check(name, length)
    with Results(config.output, asked, _about(config)) as results:
        if results.dropped and distributed.is_main():
            print(f"{results.path}: the last line was cut; what it held is asked again", flush=True)
        if isinstance(config, QuestionConfig):
            run_questions(task, methods, config.method, config.lengths, results, config.progress)
        else:
            run_perplexity(config, methods, haystack, results)
    return distributed.same_on_all(lambda: _report(results, title))


def _report(results: Results, title: str) -> str:
    files = write_report(results, title)
    return "\n".join([markdown(summarise(results.records)), "", *(str(file) for file in [results.path, *files])])


def run_perplexity(config: PerplexityConfig, methods: Methods, haystack: Haystack, results: Results) -> None:
    """The losses of all rows that `results` do not hold yet."""
    bos_id, read_first = _begins(config)
    rows = {length: cut_rows(haystack, length, config.rows, bos_id, read_first) for length in config.lengths}
    todo = [(length, name) for length in config.lengths for name in config.method]
    done = sum(results.has(n, Cell("perplexity", t, None, i)) for t, n in todo for i in range(len(rows[t])))
    with EvalProgress(config.progress, sum(len(rows[length]) for length, _ in todo), done) as shown:
        for length, name in todo:
            cells = [(Cell("perplexity", length, None, i), row) for i, row in enumerate(rows[length])]
            cells = [(cell, row) for cell, row in cells if not results.has(name, cell)]
            model = methods.model_for(name, length) if cells else None
            losses = Losses(model, length, config.buckets, int(read_first is not None)) if cells else None
            for first in range(0, len(cells), losses.rows if losses else 1):
                some = cells[first : first + losses.rows]
                start = time.perf_counter()
                sums, counts = losses([row for _, row in some])
                seconds = (time.perf_counter() - start) / len(some)
                for (cell, row), row_sums, row_counts in zip(some, sums, counts):
                    text = methods.model.vocabulary.decode(row.targets)
                    line = record(name, cell, row, text, row_sums, row_counts, seconds) | {"compiled": first == 0}
                    results.add(line)
                    shown.step(f"{name} {length}", f"loss {line['loss']:.4f}")


def _open_model(config: EvalConfig) -> Methods:
    description = _opened(config).description
    context, changes = float(description.context), {}
    if config.rope_scaling is not None:
        original = None if config.rope_scaling == "linear" else description.context
        changes["rope_scaling"] = RopeScaling(config.rope_scaling, config.rope_factor, original)
        context *= config.rope_factor
    if config.rope_theta is not None:
        changes["rope_theta"], context = config.rope_theta, float("inf")  # how far it carries, the user knows
    parallel = Parallel()
    if config.mesh is not None:
        mesh = make_mesh(config.mesh)
        parallel = Parallel(mesh, config.layout, config.strategy, config.backend, host_size=config.host_size)
    template = getattr(config, "template", None)
    template = None if template in (LWM, NONE, CHAT) else template
    options = dict(dtype=config.dtype, template=template, changes=changes)
    model = TextModel.load(config.model, parallel=parallel, stage=config.stage, adapter=config.adapter, **options)
    return Methods(model, config.options(), context)


def _opened(config: EvalConfig) -> Published:
    return open_model(config.model, config.stage, config.adapter)


def _task(config: QuestionConfig, model: TextModel, haystack: Haystack, texts: list[str]) -> Task:
    form = Form(model, config.template if config.template in (LWM, NONE) else CHAT)
    new = {} if config.max_new_tokens is None else {"max_new_tokens": config.max_new_tokens}
    if isinstance(config, NeedleConfig):
        return NeedleTask(
            form, haystack, tuple(map(float, config.depths)), config.per_cell, config.needles, config.retrieve,
            config.digits, config.score == "likelihood", config.seed, **new,
        )  # fmt: skip
    passages = None if config.qa is None else read_passages(config.qa)
    return RulerTask.of(
        form, haystack, texts, passages, tasks=config.tasks, per_task=config.per_task, seed=config.seed, **new
    )


def _begins(config: EvalConfig) -> tuple[int | None, int | None]:
    """The begin token of every row of perplexity, and the one that is only read, where a text begins.

    A run and the model that it began with are measured on the same tokens: rows begin as the tokenizer has texts begin.
    A run whose examples began with a begin token all the same reads one first.
    """
    own = _opened(config)
    bos_id, began = (Vocabulary.of(x).bos_id for x in (dataclasses.replace(own, begins=None), own))
    return bos_id, began if bos_id is None else None


def _asked(config: EvalConfig, texts: list[str], model: TextModel) -> dict[str, Any]:
    """What decides the answers to the questions of a grid."""
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    asked |= {"model": _opened(config).fingerprint, "haystack": text_fingerprint(texts)}
    asked["dtype"] = model.model.config.dtype
    template = getattr(config, "template", None)
    if template is not None:
        is_file = Path(template).is_file()
        asked["template"] = text_fingerprint([Path(template).read_text("utf-8")]) if is_file else template
    if isinstance(config, NeedleConfig) and config.needles > 1:
        asked["depths"] = config.depths  # the other needles lie at any of them
    if isinstance(config, PerplexityConfig):
        asked["read_first"] = _begins(config)[1]
    if isinstance(config, RulerConfig):
        asked["qa"] = None if config.qa is None else text_fingerprint([Path(config.qa).read_text("utf-8")])
    return asked


def _about(config: EvalConfig) -> dict[str, Any]:
    from ringjax import __version__

    device = jax.devices()[0]
    return {"ringjax": __version__, "device": device.device_kind, "options": dataclasses.asdict(config)}
