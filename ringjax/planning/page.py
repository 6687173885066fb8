"""A plan as one HTML file: the table, the reasons, the pictures inside it, nothing loaded from elsewhere."""

import base64
import html
from collections.abc import Iterator, Sequence

from ringjax.planning import card, pictures, plan_pictures
from ringjax.planning.devices import GIB
from ringjax.planning.plan import StagePlan
from ringjax.planning.traffic import Traffic

# Rings are drawn up to this size; a larger one looks the same.
DRAWN = 8
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22252b; background: #f3f1ec; margin: 2rem auto; max-width: 72rem;
       padding: 0 1rem }
h1, h2 { font-weight: 600 } table { border-collapse: collapse; width: 100%; background: #fbfaf7 }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #d9d6cf; vertical-align: top }
img { max-width: 100%; margin: 1rem 0 } .no { color: #b3261e; font-weight: 600 } .yes { color: #2c6e49 }
"""
COLUMNS = "stage", "dp,fsdp,tp,sp", "a step", "GiB", "fits", "step", "tokens/s", "MFU", "most of it", "the compiler"


def page(plans: Sequence[StagePlan], name: str) -> str:
    """The page of a run called `name`."""
    target = plans[0].target
    title = f"{name} on {target}"
    rows = "\n".join(f"<tr>{''.join(_cells(plan))}</tr>" for plan in plans)
    heads = "".join(f"<th>{column}</th>" for column in COLUMNS)
    problems = "".join(f"<p>{_text(plan.stage.name)}: {_text(why)}</p>" for plan in plans if (why := plan.why_not()))
    figures = "\n".join(f'<img alt="{_text(said)}" src="{_inline(figure)}">' for said, figure in _figures(plans))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style>
<h1>{_text(title)}</h1>
<p>{target.count} × {_text(target.device.kind)}, {target.device.flops / 1e12:.0f} TFLOP/s and
{target.device.usable / GIB:.1f} GiB each. Times are by arithmetic{
        "" if target.device.rates.measured else "; the shares of the peak are assumed, not measured on this device"
    }.</p>
<table><tr>{heads}</tr>
{rows}</table>
{problems}
{figures}
</html>
"""


def _cells(plan: StagePlan) -> Iterator[str]:
    training, said = plan.stage.training, plan.compiled
    words = (
        "not asked" if said is None else f"{said.used / GIB:.2f} GiB; rotations: {said.rotations}; {said.seconds:.0f} s"
    )
    values = (
        plan.stage.name, f"{','.join(map(str, plan.sizes))} {plan.stage.mesh.layout} {plan.stage.mesh.strategy}",
        f"{training.batch_size} × {training.seq_len:,} tokens, {plan.stage.model.remat}",
        f"{plan.memory.total / GIB:.1f}",
        "yes" if plan.fits else "no", f"{plan.time.seconds:.3g} s", f"{plan.tokens / plan.time.seconds:,.0f}",
        f"{plan.time.mfu:.1%}", plan.bound, words,
    )  # fmt: skip
    for column, value in zip(COLUMNS, values):
        kind = f' class="{value}"' if column == "fits" else ""
        yield f"<td{kind}>{_text(value)}</td>"


def _figures(plans: Sequence[StagePlan]) -> Iterator[tuple[str, object]]:
    yield "memory of each stage", plan_pictures.draw_memory(plans)
    yield "time of each stage", plan_pictures.draw_time(plans)
    ring = max(plan.sizes[3] for plan in plans)
    if ring > 1:
        yield "work of each device and hop", pictures.draw_work(min(ring, DRAWN), 4096)
    traffic = {plan.stage.name: _sent(plan) for plan in plans if plan.sizes[3] > 1}
    if traffic:
        yield "bytes on the wire", pictures.draw_traffic(traffic)
    yield "FLOPs against context", plan_pictures.draw_flops_ratio()


def _sent(plan: StagePlan) -> Traffic:
    model, training, (dp, fsdp, tp, sp) = plan.stage.model, plan.stage.training, plan.sizes
    rows = training.batch_size // training.accumulation // (dp * fsdp)
    return Traffic.of(
        plan.stage.mesh.layout, sp, training.seq_len, kv_heads=max(1, model.key_heads // tp), head_dim=model.head_size,
        batch=rows, dtype=model.dtype, window=model.window,
    )  # fmt: skip


def _inline(figure) -> str:
    return f"data:image/png;base64,{base64.b64encode(card.png(figure)).decode()}"


def _text(words: str) -> str:
    return html.escape(str(words))
