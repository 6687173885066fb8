"""samples.png and report.md of the quickstart."""

import textwrap
from pathlib import Path

import jax
import numpy as np

from ringjax.data import samples
from ringjax.evaluation.quickstart import DRAWING, WRITING, Findings
from ringjax.training.checkpoint import FOLDER, step_folders
from ringjax.training.load import load_config
from ringjax.training.metrics import read_metrics

_GREY = {"cmap": "gray_r", "vmin": 0, "vmax": 255, "interpolation": "nearest"}
_WRONG = "tab:red"
_QUOTES = "‘’“”–—…"


def draw_samples(run_dir: str | Path, findings: Findings) -> Path:
    """Draw every drawing, some captions and the prose to samples.png, and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(8, 1))
    left, right = above.subfigures(1, 2, width_ratios=(1.6, 1))
    _draw_drawings(left, findings)
    _draw_captions(right, findings)
    _draw_prose(below, findings)
    path = Path(run_dir) / "samples.png"
    figure.savefig(path)
    return path


def _draw_drawings(figure, findings: Findings) -> None:
    drawings = findings.drawings
    count = len(drawings.labels) // 10
    wrong = "all that were drawn; red: the classifier took it for the digit beside it"
    figure.suptitle(f"Drawn from words\n{wrong}", fontsize=10)
    grid = figure.subplots(10, count, squeeze=False)
    for axes, image, label, seen in zip(grid.ravel(), drawings.images, drawings.labels, drawings.recognised):
        _show(axes, image, wrong=label != seen)
        if label != seen:
            axes.text(27, 1, str(seen), color=_WRONG, fontsize=7, ha="right", va="top")
    for digit in range(10):
        grid[digit, 0].set_ylabel(samples.digit_caption(digit), rotation=0, ha="right", va="center", fontsize=9)


def _draw_captions(figure, findings: Findings) -> None:
    captions = findings.captions
    figure.suptitle("Held-out digits and what was written about them\nthe first of them; red: wrong", fontsize=10)
    grid = figure.subplots(6, 10).ravel()
    for axes, image, written, right in zip(grid, captions.images, captions.written, captions.right):
        _show(axes, image, wrong=not right)
        axes.set_xlabel(_plain(written)[:9] or "(nothing)", fontsize=7, labelpad=2, color="black" if right else _WRONG)
    for axes in grid[len(captions.written) :]:
        axes.set_axis_off()


def _draw_prose(figure, findings: Findings) -> None:
    axes = figure.subplots()
    axes.set_axis_off()
    text = f"Prose goes on: {_plain(findings.beginning)} ►{_plain(findings.continuation)}"
    axes.text(0, 1, textwrap.fill(text, 200), fontsize=9, va="top", parse_math=False)


def _show(axes, image: np.ndarray, wrong: bool) -> None:
    axes.imshow(image, **_GREY)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=_WRONG if wrong else "lightgrey", linewidth=1.5 if wrong else 0.5)


def _plain(text: str) -> str:
    """Text on one line, without characters that a font may lack: half trained models write any bytes."""
    return " ".join("".join(c if c.isprintable() and (ord(c) < 0x250 or c in _QUOTES) else " " for c in text).split())


def write_report(run_dir: str | Path, findings: Findings, short: bool) -> Path:
    """Write report.md and return its path."""
    path = Path(run_dir) / "report.md"
    path.write_text("\n".join([*_numbers(findings, short), *_how(Path(run_dir), findings), ""]), encoding="utf-8")
    return path


def _numbers(findings: Findings, short: bool) -> list[str]:
    bars = findings.bars
    if short:
        verdict = (
            "**Short form: the model was hardly trained, so the bars do not count; this shows that everything runs.**"
        )
    elif all(bar.met for bar in bars):
        verdict = "All bars are met."
    else:
        verdict = f"**Missed: {'; '.join(bar.name for bar in bars if not bar.met)}.**"
    lines = [
        "# What the quickstart's model has learned",
        "",
        verdict,
        "",
        "| | found | bar | |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {b.name} | {b.found} | {b.wanted} | {'-' if short else 'met' if b.met else 'MISSED'} |" for b in bars]
    return lines


def _how(run_dir: Path, findings: Findings) -> list[str]:
    config = load_config(run_dir / "config.yaml")
    stage, prose = config.stage_list[-1], findings.prose
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]
    seconds = sum(record.get("seconds") or 0.0 for record in records)
    saved = step_folders(run_dir / FOLDER)
    per_word = len(findings.drawings.labels) // 10
    steps, rows = saved[0][0] if saved else 0, stage.training.batch_size
    return [
        "",
        f"- Trained {steps} steps of {rows} × {stage.training.seq_len} tokens in {seconds:.0f} s (compilation and"
        f" evaluation not counted); looked at in {findings.seconds:.0f} s on {jax.devices()[0].device_kind}.",
        "- Captions: the likeliest words, compared with the whole caption. The pictures were never trained on.",
        f"- Drawings: {per_word} of each word, temperature {DRAWING.temperature}, guidance {DRAWING.guidance},"
        f" seed {DRAWING.seed}; every one counts. The classifier (an RBF support vector machine trained on the real"
        f" training digits) recognises {findings.drawings.classifier:.1%} of the real held-out digits.",
        f"- Prose: {prose.tokens} tokens of a novel that was never trained on, in rows of {stage.training.seq_len}."
        " The bigram model is counted on the training novels, over the same tokens, with the smoothing that suits the"
        " held-out text best.",
        f"- The text goes on (temperature {WRITING.temperature}, top-p {WRITING.top_p}):",
        "",
        *textwrap.wrap(f"> {_plain(findings.beginning)} ►{_plain(findings.continuation)}", 110, subsequent_indent="> "),
        "",
        "![samples](samples.png)",
        "",
        "![loss](loss.png)",
    ]
