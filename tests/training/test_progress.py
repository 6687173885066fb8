"""What a person sees."""

import io

import pytest

from ringjax.training.progress import PlainLines, Quiet, RichDisplay, format_count, format_duration, make_display

RECORD = {
    "step": 2, "stage_step": 2, "loss": 3.25, "text_loss": 3.5, "vision_loss": None, "grad_norm": 0.5,
    "tokens_per_second": 20600.0, "mfu": 0.331,
}  # fmt: skip


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (-5, "0:00")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("number, text", [(5, "5"), (20600, "20.6k"), (1.24e9, "1.24G"), (3e6, "3M")])
def test_counts(number, text):
    assert format_count(number) == text


def test_plain_lines_come_at_the_first_last_and_every_nth_step():
    stream = io.StringIO()
    lines = PlainLines(every=4, stream=stream)
    lines.start_stage("32k", 0, 10)
    for step in range(1, 11):
        lines.step({**RECORD, "stage_step": step})
    printed = stream.getvalue().splitlines()
    assert [line.split()[1] for line in printed] == ["1/10", "4/10", "8/10", "10/10"]
    assert printed[1].startswith("32k 4/10  loss 3.2500  text 3.5000  grad 0.5  20.6k tok/s  MFU 33.1 %  left ")
    assert "pictures" not in printed[1] and printed[-1].endswith("left 0:00")


def test_speeds_are_means_over_the_last_steps():
    """4000 tokens a step in 0.1, 0.1, 0.1 and 0.5 s are 20k a second, whatever the last says; the next stage anew."""
    stream = io.StringIO()
    lines = PlainLines(every=4, stream=stream)
    for seconds in ((0.1, 0.1, 0.1, 0.5), (2.0, 2.0, 2.0, 2.0)):
        lines.start_stage("a", 0, 100)
        for step, took in enumerate(seconds, 1):
            speeds = {"seconds": took, "tokens_per_second": 4000 / took, "mfu": 0.01 / took}
            lines.step({**RECORD, "stage_step": step, **speeds})
    printed = [line for line in stream.getvalue().splitlines() if " 4/100 " in line]
    assert "  20k tok/s  MFU 5.0 %" in printed[0] and "  2k tok/s  MFU 0.5 %" in printed[1]


def test_speeds_of_steps_that_are_not_the_same_work():
    """Three padded steps and a full one, each as fast as its work is: MFU is that of all four, not of the last."""
    stream = io.StringIO()
    lines = PlainLines(every=4, stream=stream)
    lines.start_stage("a", 0, 100)
    for step, (took, mfu) in enumerate(((0.1, 0.1), (0.1, 0.1), (0.2, 0.1), (0.4, 0.4)), 1):
        lines.step({**RECORD, "stage_step": step, "seconds": took, "tokens_per_second": 4000 / took, "mfu": mfu})
    assert "  20k tok/s  MFU 25.0 %" in stream.getvalue().splitlines()[-1]


def test_rich_display_shows_the_same_numbers():
    from rich.console import Console

    stream = io.StringIO()
    display = RichDisplay(Console(file=stream, force_terminal=True, width=120, legacy_windows=False))
    display.start_stage("train", 0, 10)
    display.step(RECORD)
    display.say("a [line] with brackets")
    display.close()
    shown = stream.getvalue()
    assert "loss 3.2500" in shown and "20.6k tok/s" in shown and "a [line] with brackets" in shown


def test_only_the_main_process_speaks(capsys):
    assert type(make_display("plain", 1, is_main=False)) is Quiet
    assert type(make_display("none", 1)) is Quiet
    assert type(make_display("auto", 1)) is PlainLines  # the captured output is no terminal
    make_display("plain", 1, is_main=False).say("nothing")
    assert capsys.readouterr().out == ""
