"""`ringjax plan` as people use it."""

import re

import pytest

from ringjax import cli
from ringjax.planning.devices import Target
from ringjax.planning.plan import plan_stage
from ringjax.training.load import load_config

CONFIG, LORA = "configs/lwm_text.yaml", "configs/extend_135m_lora.yaml"


def run(capsys, *arguments):
    code = cli.main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_stages_that_fit(capsys):
    code, out, _ = run(capsys, CONFIG, "--target", "tpu:v4:8x8x8")
    assert code == 0 and all(f"│ {name}" in out for name in ("32k", "128k", "256k", "512k", "1m"))
    assert out.count(" yes ") == 5 and "512 × TPU v4" in out
    assert "the shares of the peak behind them are assumed" in out and "--compile asks the compiler" in out
    assert "1m: a rotation of 128 MiB hides behind its hop's attention: 32,768 tokens a device" in out


def test_one_that_does_not_fit_says_by_how_much_and_why(capsys):
    code, out, _ = run(capsys, CONFIG, "--target", "tpu:v5e:16x16", "--stage", "1m")
    assert code == 0 and " no " in out
    found = re.search(
        r"1m does not fit: needs ([\d.]+) GiB of 15.8, ([\d.]+) too many; most is kept, .*; keep less", out
    )
    assert found and float(found[1]) - 15.75 == pytest.approx(float(found[2]), abs=0.1)


def test_the_search_writes_a_config_that_is_the_plan_it_printed(capsys, tmp_path):
    path = tmp_path / "found.yaml"
    arguments = CONFIG, "--target", "h100:64", "--stage", "128k", "--search", "--output", path
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and f"wrote {path}" in out and "contiguous takes +" in out
    written = load_config(path)
    (stage,) = written.stages
    plan = plan_stage(written, stage, Target.parse("h100:64"))
    given = load_config(CONFIG, [("stages.1.mesh.shape", "1,-1,1,2")])
    assert plan.fits and plan.time.seconds < plan_stage(given, given.stages[1], plan.target).time.seconds
    assert ",".join(map(str, plan.sizes)) in out and stage.model.remat in out
    code, _, error = run(capsys, *arguments)
    assert code == 2 and "is there already" in error


def test_no_better_plan_is_left_out_of_the_search(capsys):
    """The best of all is no worse than what a person would try by hand."""
    from ringjax.planning.search import search

    run_config, target = load_config("configs/long_1b.yaml"), Target.parse("h100:8")
    stage = run_config.stages[3]
    best = search(run_config, stage, target).plan
    for shape in ("1,1,1,8", "1,1,2,4", "1,1,8,1"):
        for remat in ("full", "save_attention", "save_products"):
            overrides = [("stages.3.mesh.shape", shape), ("stages.3.model.remat", remat)]
            by_hand = load_config("configs/long_1b.yaml", overrides)
            plan = plan_stage(by_hand, by_hand.stages[3], target)
            assert not plan.fits or best.time.seconds <= plan.time.seconds


def test_the_page_needs_nothing_else(capsys, tmp_path):
    path = tmp_path / "plan.html"
    assert run(capsys, CONFIG, "--target", "h100:512", "--stage", "1m", "--html", path)[0] == 0
    page = path.read_text()
    assert page.count("data:image/png;base64,") == 5 and "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "NVIDIA H100" in page


@pytest.mark.parametrize("arguments, message", [
    ((CONFIG, "--target", "h10:8"), "unknown device 'h10'; did you mean 'h100'?"),
    ((CONFIG, "--target", "h100:64"), "stage '1m': mesh shape '1,-1,4,32' asks for 128 devices"),
    ((CONFIG, "--target", "h100:512", "--stage", "2m"), "there is no stage '2m'; the stages are 32k, 128k"),
    ((CONFIG, "--target", "h100:512", "--mesh.strategy", "ulysses"), "ulysses over sp 16 cannot split 8 query"),
    ((CONFIG, "--target", "h100:512", "--mesh.strategy", "two_level", "--mesh.host_size", "3"), "into hosts of 3"),
    ((CONFIG, "--target", "h100:512", "--mesh.host_size", "8"), "host_size 8 means nothing to strategy 'ring'"),
    ((CONFIG, "--target", "h100:512", "--compile"), "compiling ahead of time is for TPU slices"),
    ((LORA, "--target", "h100:1"), "lora: a plan is of full training"),
    ((LORA, "--target", "h100:1", "--lora", "null"), "stage '32k': model.shifted_group 8192: a plan is of full"),
    ((CONFIG, "--output", "x.yaml"), "give --search too"),
    ((CONFIG, "--targe", "h100:512"), "unknown key 'targe'"),
    (("nowhere.yaml",), "config nowhere.yaml does not exist"),
    ((), ""),
])  # fmt: skip
def test_what_is_wrong_is_one_line(capsys, arguments, message):
    code, out, error = run(capsys, *arguments)
    if not arguments:
        assert code == 0 and "--target" in out
        return
    assert code == 2 and message in error and "Traceback" not in error
