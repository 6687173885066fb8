"""What is typed behind a command, read into its dataclass: `--key value` pairs, lists, help.

    split_overrides   --section.key value      read_options   one value an option, words as they are
    split_lists       --key value value …      read_lists     fields that are tuples take all values
"""

import dataclasses
from collections.abc import Sequence
from typing import NoReturn


class UsageError(ValueError):
    """The command line is wrong."""


def split_overrides(
    arguments: Sequence[str], flags: Sequence[str] = (), lists: Sequence[str] = ()
) -> tuple[list[str], list[tuple[str, str]]]:
    """Positional arguments, and `--key value` / `--key=value` pairs in order; a key without value is `true`.

    `flags` are keys whose value is true or false: anything else behind them is not theirs. `lists` are keys that take
    everything up to the next key: a pair for each value.
    """
    positional, pairs, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            positional.append(argument)
            continue
        key, given, value = argument[2:].partition("=")
        key = key.replace("-", "_")
        if not given:
            bare = not rest or rest[0].startswith("--") or (key in flags and rest[0] not in ("true", "false"))
            value = "true" if bare else rest.pop(0)
        pairs.append((key, value))
        while key in lists and not given and rest and not rest[0].startswith("--"):
            pairs.append((key, rest.pop(0)))
    return positional, pairs


def split_lists(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Positional arguments, and each `--key` with all the values behind it: for options that are lists."""
    positional, pairs = [], []
    for argument in arguments:
        if argument.startswith("--"):
            key, given, value = argument[2:].partition("=")
            pairs.append((key.replace("-", "_"), [value] if given else []))
        else:
            (pairs[-1][1] if pairs else positional).append(argument)
    return positional, pairs


def print_help(default, usage: str, about: str) -> NoReturn:
    """Every option of a config dataclass with its type and the value in `default`; leaves."""
    import tyro

    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    tyro.cli(
        type(default), default=default, args=["--help"], prog=usage, description=about, config=options,
        use_underscores=True,
    )  # fmt: skip
    raise SystemExit(0)


def read_options(kind, arguments: list[str], command: str, positional: dict[str, str], hint: str):
    """The dataclass `kind` from one argument for each field of `positional`, and `--key value`.

    A field that is a tuple of words takes its option as often as it is given.
    """
    from ringjax.training.typed import build
    from ringjax.training.yaml_tree import Item, parse_value, to_item

    fields = dataclasses.fields(kind)
    given, pairs = split_overrides(arguments, [field.name for field in fields if field.type is bool])
    if len(given) != len(positional):
        wanted, found = " ".join(positional.values()), " ".join(given) or "none"
        one = "one " if len(positional) == 1 else ""
        raise UsageError(f"ringjax {command} takes {one}{wanted}, not {found}; {hint}")
    # Words are taken as they are: a prompt of "7" is no number.
    words = [field.name for field in fields if field.type in (str, str | None)]
    values = {k: to_item(v, f"--{k}") if k in words else parse_value(v, f"--{k}") for k, v in pairs}
    for field in fields:  # an option that may be repeated
        if field.type == tuple[str, ...] and field.name in values:
            values[field.name] = to_item([v for k, v in pairs if k == field.name], f"--{field.name}")
    values |= {field: to_item(value, "command line") for field, value in zip(positional, given)}
    return build(kind, Item(values, "command line"))


def read_lists(kind, pairs: list[tuple[str, list[str]]], prefix: str = "--"):
    """The dataclass `kind` from `--key value …`; a field that is a tuple takes all values, another exactly one."""
    from ringjax.training.typed import build
    from ringjax.training.yaml_tree import Item, parse_value, to_item

    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    values = {}
    for key, given in pairs:
        where, type_name = f"{prefix}{key}", types.get(key, "")
        is_list = type_name.startswith("tuple")
        if not is_list and len(given) > 1:
            raise UsageError(f"{where} takes one value, not {len(given)}: {' '.join(given)}")
        if not given and not is_list and "bool" not in type_name and type_name:
            raise UsageError(f"{where} takes a value, and there is none behind it; --help says what it is")
        # Words are taken as they are: heads of "16" are no number, and `null` is none.
        words = "str" in type_name and given != ["null"]
        given = given or ([] if is_list else ["true"])
        items = [to_item(value, where) if words else parse_value(value, where) for value in given]
        values[key] = Item(items, where) if is_list else items[0]
    return build(kind, Item(values, "command line"))
