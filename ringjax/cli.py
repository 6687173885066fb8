"""The command line: `ringjax train`, `plan`, `generate`, `chat`, `eval`, `convert`, `info`, `tokenize`, `bench`, ….

Exit codes are in `ringjax.exit_codes`; docs/faults.md says what a supervisor does with each. Errors are one line on
standard error; `--debug` shows where they come from.
"""

import contextlib
import dataclasses
import difflib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from ringjax import disk
from ringjax.cli_options import UsageError, print_help, read_lists, read_options, split_lists, split_overrides
from ringjax.exit_codes import ExitCode, code_of

OK, FAILED, USAGE = ExitCode.FINISHED, ExitCode.FAILED, ExitCode.REFUSED


class Command(NamedTuple):
    """A subcommand: what it does on its arguments, and one line of help."""

    run: Callable[[list[str]], int]
    usage: str
    help: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments)
    except SystemExit as stop:  # tyro's help and usage errors
        return stop.code if isinstance(stop.code, int) else OK
    except KeyboardInterrupt:
        return _report("interrupted", ExitCode.INTERRUPTED, debug)
    except BrokenPipeError:  # the reader went away: `ringjax config show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        return _left(_report(_message(error), code_of(error), debug))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return OK if arguments else USAGE
    from ringjax import accelerator

    accelerator.prepare()
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        import ringjax

        print(f"ringjax {ringjax.__version__}")
        return OK
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; {_nearest(name, COMMANDS)}")
    return COMMANDS[name].run(rest)


def _overview() -> str:
    lines = ["usage: ringjax COMMAND [--debug] …", ""]
    lines += [f"  {command.usage:44s} {command.help}" for command in COMMANDS.values()]
    return "\n".join([*lines, "", "ringjax COMMAND --help says more."])


def _left(code: int) -> int:
    """The exit code; a process that ends alone, because of an error that the others don't have, is gone at once."""
    peers = sys.modules.get("ringjax.training.peers")
    return code if peers is None else peers.leave(code)


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    with contextlib.suppress(OSError):  # a log on a full disk changes no exit code
        for line in message.splitlines():
            print(f"ringjax: error: {line}", file=sys.stderr, flush=True)
    return code


def _message(error: Exception) -> str:
    expected = (ValueError, NotImplementedError, RuntimeError, OSError, ImportError)
    text = str(error).strip()
    if isinstance(error, OSError) and (problem := disk.problem(error)) is not None:
        return f"the disk {problem}: {text}; mend that and run the same command again"
    if isinstance(error, expected) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


def _nearest(name: str, choices) -> str:
    near = difflib.get_close_matches(name, choices, 1)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(choices)}"


def _load(arguments: list[str], command: str):
    """The run named on the command line with its overrides; prints the help and leaves for `--help`."""
    from ringjax.interop.start import open_start
    from ringjax.training.load import load_run

    wants_help = any(argument in ("-h", "--help") for argument in arguments)
    positional, pairs = split_overrides([a for a in arguments if a not in ("-h", "--help")])
    if wants_help:
        _config_help(command, load_run(positional[0], pairs, open_start) if positional else None)
    if len(positional) != 1:
        raise UsageError(f"ringjax {command} takes one CONFIG, not {len(positional)}: {' '.join(positional) or 'none'}")
    return load_run(positional[0], pairs, open_start)


def _config_help(command: str, config) -> NoReturn:
    """Print every override with its type and value, and leave."""
    from ringjax.training.load import parse_config

    config = config or parse_config("{model: {size: debug}, data: {}}")
    about = "Overrides on top of CONFIG, with its values. Stages are set alike: --stages.0.training.steps 10"
    config = dataclasses.replace(config, stages=()) if hasattr(config, "stages") else config
    print_help(config, f"ringjax {command} CONFIG", about)


def _train(arguments: list[str]) -> int:
    with _terminated_early():
        config = _load(arguments, "train")
        from ringjax.interop.start import open_start
        from ringjax.training.loop import train
        from ringjax.training.out_of_memory import OutOfMemory

        try:
            train(config, open_start)
        except OutOfMemory as error:
            from ringjax.planning.advice import advice

            raise OutOfMemory("\n".join([str(error), *advice(error.stage)]), error.stage) from error
    return OK


@contextlib.contextmanager
def _terminated_early():
    """SIGTERM before the training loop looks for it: nothing to save, and the same exit code as after a save."""

    def stop(*_) -> NoReturn:
        from ringjax.training.stops import Preempted

        raise Preempted("SIGTERM before the first step: nothing new to save; the same command begins again")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plan(arguments: list[str]) -> int:
    from ringjax.planning.command import PlanConfig, run_plan
    from ringjax.training.load import load_config

    names = [field.name for field in dataclasses.fields(PlanConfig)]
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print_help(PlanConfig(), "ringjax plan CONFIG", PlanConfig.__doc__)
    positional, pairs = split_overrides(arguments, ["compile", "search"])
    options = read_lists(PlanConfig, [(key, [value]) for key, value in pairs if key in names])
    if len(positional) != 1:
        raise UsageError(f"ringjax plan takes one CONFIG, not {len(positional)}: {' '.join(positional) or 'none'}")
    import jax

    jax.config.update("jax_platforms", "cpu")  # a plan needs no accelerator, and takes none
    run_plan(load_config(positional[0], [pair for pair in pairs if pair[0] not in names]), options)
    return OK


def _config(arguments: list[str]) -> int:
    if not arguments or arguments[0] != "show":
        raise UsageError("usage: ringjax config show CONFIG [--section.key value …]")
    from ringjax.training.load import to_yaml

    print(to_yaml(_load(arguments[1:], "config show")), end="")
    return OK


def _info(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(
            "usage: ringjax info\n\nVersions, devices, and attention backends with the reason where one can't be used."
        )
        return OK
    if arguments:
        raise UsageError(f"ringjax info takes no arguments, not {' '.join(arguments)}")
    from ringjax.info import report

    print(report())
    return OK


def _tokenize(arguments: list[str]) -> int:
    from ringjax.data.tokenize import run_tokenize
    from ringjax.data.tokenize_config import TokenizeConfig
    from ringjax.training.typed import build
    from ringjax.training.yaml_tree import Item, parse_value, to_item

    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        usage = "ringjax tokenize INPUT … --output FOLDER"
        print_help(TokenizeConfig(("INPUT",), "FOLDER"), usage, "Text, pictures and clips to a data set.")
    flags = [field.name for field in dataclasses.fields(TokenizeConfig) if field.type is bool]
    words = [field.name for field in dataclasses.fields(TokenizeConfig) if "str" in str(field.type)]
    lists = ("inputs", "fields")
    inputs, pairs = split_overrides(arguments, flags, lists)
    # Words are taken as they are: "[vision],caption" would be a list in YAML.
    values = {
        key: to_item(value, f"--{key}") if key in words and value != "null" else parse_value(value, f"--{key}")
        for key, value in pairs
    }
    given = {name: [value for key, value in pairs if key == name] for name in lists}
    given["inputs"] += inputs
    values |= {name: to_item(found, "command line") for name, found in given.items() if found}
    print(run_tokenize(build(TokenizeConfig, Item(values, "command line"))))
    return OK


def _generate(arguments: list[str]) -> int:
    from ringjax.inference.command import GenerateConfig, run_generate
    from ringjax.inference.on_mesh import watched

    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        about = "Text, words about pictures (--image), a picture or clip from words (--draw), or both (--interleaved)."
        print_help(GenerateConfig("MODEL", "WORDS"), "ringjax generate MODEL", about)
    hint = "put a prompt in quotes after --prompt"
    with watched("begins anew"):
        run_generate(read_options(GenerateConfig, arguments, "generate", {"run_dir": "MODEL"}, hint))
    return OK


def _chat(arguments: list[str]) -> int:
    from ringjax.inference.chat_command import ChatConfig, run_chat

    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print_help(ChatConfig("MODEL"), "ringjax chat MODEL", "Talk to a published model in the terminal.")
    run_chat(read_options(ChatConfig, arguments, "chat", {"model": "MODEL"}, "what you say is typed, or piped in"))
    return OK


def _convert(arguments: list[str]) -> int:
    from ringjax.interop.command import ConvertConfig, run_convert

    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        about = "Weights from one project's form to another's; nothing is overwritten."
        print_help(ConvertConfig("SOURCE", "TARGET"), "ringjax convert SOURCE TARGET", about)
    names = {"source": "SOURCE", "target": "TARGET"}
    print(run_convert(read_options(ConvertConfig, arguments, "convert", names, "--help lists the options")))
    return OK


def _eval(arguments: list[str]) -> int:
    from ringjax.evaluation.eval_command import KINDS, run_eval

    usage = (
        "usage: ringjax eval needle MODEL [--lengths T …] [--depths P …] [--method M …] …\n"
        "       ringjax eval ruler MODEL [--tasks NAME …] …\n"
        "       ringjax eval perplexity MODEL [--lengths T …] …\n"
        "       ringjax eval captions RUN [--data HELDOUT.jsonl] …\n"
        "       ringjax eval drawings RUN [--data HELDOUT.jsonl] [--judge RUN] …\n"
        "       ringjax eval gallery RUN [--data HELDOUT.jsonl] [--output NAME.png] …\n"
        "       ringjax eval video_needle RUN --data HELDOUT.jsonl [--lengths T …] …\n\n"
        "Does a model read its context? Does it know what it sees, and can it draw? --help after any of them lists its"
        " options."
    )
    if (code := _which("evaluation", KINDS, usage, arguments)) is not None:
        return code
    name, kind = arguments[0], KINDS[arguments[0]]
    if any(argument in ("-h", "--help") for argument in arguments):
        print_help(kind("MODEL"), f"ringjax eval {name} MODEL", kind.__doc__)
    positional, pairs = split_lists(arguments[1:])
    if len(positional) != 1:
        found = " ".join(positional) or "none"
        raise UsageError(f"ringjax eval {name} takes one MODEL before its options, not {found}")
    from ringjax.inference.on_mesh import watched
    from ringjax.training.distributed import is_main

    with watched("asks what has no answer yet"):
        said = run_eval(read_lists(kind, [("model", positional), *pairs]))
        if is_main():
            print(said)
    return OK


def _bench(arguments: list[str]) -> int:
    benches = {"attention": _bench_attention, "train": _bench_train, "generate": _bench_generate}
    usage = (
        "usage: ringjax bench attention [--lengths T …] …\n"
        "       ringjax bench train CONFIG [--section.key value …] [--bench.steps N] …\n"
        "       ringjax bench generate [--sizes NAME …] [--contexts T …] …\n\n"
        "Each checks what it times. --help after one lists its options."
    )
    code = _which("benchmark", benches, usage, arguments)
    return benches[arguments[0]](arguments[1:]) if code is None else code


def _which(what: str, kinds, usage: str, arguments: list[str]) -> int | None:
    """None where the first argument is one of `kinds`, else the exit code after the usage was shown."""
    if arguments and arguments[0] in kinds:
        return None
    if arguments and arguments[0] not in ("-h", "--help"):
        raise UsageError(f"unknown {what} {arguments[0]!r}; {_nearest(arguments[0], kinds)}")
    print(usage)
    return OK if arguments else USAGE


def _bench_attention(arguments: list[str]) -> int:
    from ringjax.benchmarks.config import AttentionBench

    about = "Speed, memory and exposed communication of attention, each case checked before it is timed."
    config = _bench_options("attention", AttentionBench, about, arguments)
    from ringjax.benchmarks.command import bench_attention

    return OK if bench_attention(config, ["bench", "attention", *arguments]) else FAILED


def _bench_generate(arguments: list[str]) -> int:
    from ringjax.benchmarks.config import GenerateBench

    about = "Prompts read and tokens written by a model of random weights, beside what the memory allows."
    config = _bench_options("generate", GenerateBench, about, arguments)
    from ringjax.benchmarks.command import bench_generate

    return OK if bench_generate(config, ["bench", "generate", *arguments]) else FAILED


def _bench_options(name: str, kind, about: str, arguments: list[str]):
    if any(argument in ("-h", "--help") for argument in arguments):
        print_help(kind(), f"ringjax bench {name}", about)
    positional, pairs = split_lists(arguments)
    if positional:
        raise UsageError(f"ringjax bench {name} takes only --options, not {' '.join(positional)}")
    return read_lists(kind, pairs)


def _bench_train(arguments: list[str]) -> int:
    from ringjax.benchmarks.config import TrainBench, TrainOptions

    if any(argument in ("-h", "--help") for argument in arguments):
        about = "Step time, tokens a second, MFU and memory of a config's steps; --section.key value as in train."
        print_help(TrainOptions(), "ringjax bench train CONFIG", about)
    positional, pairs = split_overrides(arguments)
    bench = [(key.removeprefix("bench."), [value]) for key, value in pairs if key.startswith("bench.")]
    config = read_lists(TrainBench, bench, "--bench.")
    if len(positional) != 1:
        found = " ".join(positional) or "none"
        raise UsageError(f"ringjax bench train takes one CONFIG, not {len(positional)}: {found}")
    from ringjax.interop.start import open_start
    from ringjax.training.load import load_config

    overrides = [(key, value) for key, value in pairs if not key.startswith("bench.")]
    from ringjax.benchmarks.compare import combinations, label

    runs = [
        (label(variant), load_config(positional[0], [*overrides, *variant], open_start))
        for variant in combinations(config.compare)
    ]
    from ringjax.benchmarks.command import bench_train

    return OK if bench_train(runs, config, ["bench", "train", *arguments]) else FAILED


COMMANDS = {
    "train": Command(_train, "train CONFIG [--section.key value …]", "train, or go on where a run was stopped"),
    "plan": Command(
        _plan, "plan CONFIG --target h100:8 | tpu:v5p:4x8x8", "does it fit, how fast, which mesh; before it runs"
    ),
    "config": Command(_config, "config show CONFIG [--section.key value …]", "the resolved config as YAML"),
    "tokenize": Command(
        _tokenize, "tokenize --inputs FILE … --output FOLDER", "text, pictures and clips to a data set"
    ),
    "generate": Command(
        _generate, "generate MODEL --prompt WORDS [--image FILE]", "text and pictures after words and pictures"
    ),
    "chat": Command(_chat, "chat MODEL", "talk to a published model"),
    "eval": Command(
        _eval,
        "eval needle | ruler | perplexity | captions | drawings | gallery | video_needle MODEL",
        "does a model read its context, see and draw? table, pictures, report",
    ),
    "convert": Command(_convert, "convert SOURCE TARGET", "weights of other projects, in and out"),
    "bench": Command(
        _bench,
        "bench attention | train CONFIG | generate [--option value …]",
        "speed and memory, each result checked first",
    ),
    "info": Command(_info, "info", "devices, versions and attention backends"),
}

if __name__ == "__main__":
    sys.exit(main())
