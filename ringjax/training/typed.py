"""YAML trees to frozen dataclasses: every problem found in one reading, each with its key and line.

    run.yaml line 12: unknown key 'training.step'; did you mean 'steps'?
    --training.steps: 'ten' is not a whole number (int)
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ringjax.json_text import brief
from ringjax.training.yaml_tree import ConfigError, Item, kind_of

Config = TypeVar("Config")
_LARGEST = 1 << 1000  # what a float holds
_LONGEST_KEY, _LONGEST_LINE = 200, 2000  # characters of a message


def build(cls: type[Config], item: Item) -> Config:
    """The dataclass `cls` from a tree; raises ConfigError that lists all problems."""
    reader = _Reader()
    value = reader.read(cls, item, "")
    if reader.problems:
        raise ConfigError(reader.problems)
    return value


_FAILED = object()


class _Reader:
    """Reads items as types, collecting problems instead of stopping at the first."""

    def __init__(self):
        self.problems: list[str] = []

    def fail(self, item: Item, message: str) -> Any:
        self.problems.append(f"{item.where}: {message}")
        return _FAILED

    def read(self, kind: Any, item: Item, path: str) -> Any:
        origin = typing.get_origin(kind)
        if dataclasses.is_dataclass(kind):
            return self.dataclass(kind, item, path)
        if origin in (Union, types.UnionType):
            return self.union(typing.get_args(kind), item, path)
        if origin is typing.Annotated:
            return self.read(typing.get_args(kind)[0], item, path)
        if origin is Literal:
            return self.literal(typing.get_args(kind), item, path)
        if origin in (tuple, list) or kind in (tuple, list):
            return self.sequence(origin or kind, typing.get_args(kind), item, path)
        if origin is dict or kind is dict:
            return self.mapping(typing.get_args(kind), item, path)
        return item.value if kind is Any else self.scalar(kind, item, path)

    def dataclass(self, cls: type, item: Item, path: str) -> Any:
        if not isinstance(item.value, dict):
            return self.fail(item, f"{path or 'the config'} must be a mapping of keys, not {kind_of(item.value)}")
        hints = typing.get_type_hints(cls, include_extras=True)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        before = len(self.problems)
        values = {}
        for key, child in item.value.items():
            if key not in fields:
                self.fail(child, _unknown(_join(path, key), key, fields))
            else:
                values[key] = self.read(hints[key], child, _join(path, key))
        for name, field in fields.items():
            if name not in item.value and _required(field):
                self.fail(item, f"{_join(path, name)} is missing and has no default")
        if len(self.problems) > before:
            return _FAILED
        try:
            return cls(**values)
        except (ValueError, NotImplementedError, TypeError) as error:
            for line in _lines(error):
                self.fail(item, f"{path}: {line}" if path else line)
            return _FAILED

    def union(self, kinds: tuple, item: Item, path: str) -> Any:
        kinds_left = [kind for kind in kinds if kind is not type(None)]
        if item.value is None and len(kinds_left) < len(kinds):
            return None
        trials = []
        for kind in kinds_left:
            trial = _Reader()
            value = trial.read(kind, item, path)
            if not trial.problems:
                return value
            trials.append(trial.problems)
        if len(trials) == 1 or isinstance(item.value, dict):
            self.problems += min(trials, key=len)
            return _FAILED
        return self.fail(item, f"{path}: {_show(item.value)} is none of {', '.join(_name(kind) for kind in kinds)}")

    def literal(self, choices: tuple, item: Item, path: str) -> Any:
        if item.value in choices and not isinstance(item.value, bool):
            return item.value
        near = difflib.get_close_matches(str(item.value)[:_LONGEST_KEY], [str(choice) for choice in choices], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return self.fail(item, f"{path}: {_show(item.value)} is not one of {', '.join(map(repr, choices))}{hint}")

    def sequence(self, kind: type, args: tuple, item: Item, path: str) -> Any:
        if not isinstance(item.value, list):
            return self.fail(item, f"{path} must be a list, not {kind_of(item.value)}")
        element = args[0] if args else Any
        if kind is tuple and args and args[-1] is not Ellipsis:
            if len(args) != len(item.value):
                return self.fail(item, f"{path} must have {len(args)} values, not {len(item.value)}")
            elements = args
        else:
            elements = [element] * len(item.value)
        values = [self.read(e, child, f"{path}.{i}") for i, (e, child) in enumerate(zip(elements, item.value))]
        return _FAILED if any(value is _FAILED for value in values) else kind(values)

    def mapping(self, args: tuple, item: Item, path: str) -> Any:
        if not isinstance(item.value, dict):
            return self.fail(item, f"{path} must be a mapping, not {kind_of(item.value)}")
        kind = args[1] if args else Any
        return {key: self.read(kind, child, _join(path, key)) for key, child in item.value.items()}

    def scalar(self, kind: type, item: Item, path: str) -> Any:
        value = item.value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and is_number and (isinstance(value, int) or value.is_integer()):
            return int(value)
        if kind is float and is_number and (isinstance(value, float) or abs(value) < _LARGEST):
            return float(value)
        if kind is str and isinstance(value, str):
            return value
        if isinstance(kind, type) and issubclass(kind, Path) and isinstance(value, str):
            return Path(value)
        quote = f'; write "{value}" in quotes' if kind is str and (is_number or isinstance(value, bool)) else ""
        return self.fail(item, f"{path}: {_show(value)} is not {_name(kind)}{quote}")


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown(path: str, key: str, fields: dict) -> str:
    key, path = key[:_LONGEST_KEY], path[:_LONGEST_KEY]
    near = difflib.get_close_matches(key.replace("-", "_"), fields, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"keys here: {', '.join(fields)}"
    return f"unknown key {path!r}; {hint}"


def _lines(error: Exception) -> list[str]:
    """One line for each problem an exception speaks of; pydantic's errors hold several."""
    if hasattr(error, "errors") and callable(error.errors):
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors()]
    return [" ".join(str(error)[:_LONGEST_LINE].split())]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    return brief(value) if not isinstance(value, (dict, list)) else kind_of(value)


def _name(kind: Any) -> str:
    names = {int: "a whole number (int)", float: "a number (float)", bool: "true or false (bool)", str: "text (str)"}
    return names.get(kind, "null" if kind is type(None) else getattr(kind, "__name__", str(kind)))
