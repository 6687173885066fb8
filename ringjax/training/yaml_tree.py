"""The tree of a config file: YAML values that remember where they were written.

Command-line overrides and stages are merged into the tree before it is read as dataclasses (`typed.py`), so a wrong
value is reported in the same words wherever it came from.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ringjax.json_text import brief

# A config is small; a file that expands to more than this through YAML aliases is an attack or a mistake.
MAX_ITEMS = 20_000
MAX_DEPTH = 32
MOST_SHOWN = 50
"""Problems in one message."""

_NULL = re.compile(r"~|null|Null|NULL|")
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
# YAML 1.1 reads 1e-4 as a string, which is never meant here.
_FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?(inf|nan)")


class ConfigError(ValueError):
    """A config that cannot be used; `problems` holds one line for each thing that is wrong with it."""

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        more = len(self.problems) - MOST_SHOWN
        super().__init__("\n".join([*self.problems[:MOST_SHOWN], *([f"and {more} more problems"] if more > 0 else [])]))


class Item(NamedTuple):
    """A value of the config and where it was written ("run.yaml line 3" or "--training.steps")."""

    value: Any  # a scalar, a list of items or a dict from key to item
    where: str


def parse_yaml(text: str, origin: str) -> Item:
    """The tree of `text`; raises ConfigError for what is not a plain YAML mapping."""
    root = _composed(text, origin)
    if root is None:
        return Item({}, origin)
    item = _TreeReader(origin).read(root, 1, 0)
    if not isinstance(item.value, dict):
        raise ConfigError(f"{origin}: a config is a mapping of sections, not {kind_of(item.value)}")
    return item


def _composed(text: str, origin: str) -> yaml.Node | None:
    """The nodes of `text`, whose number and depth are known before any is made: PyYAML calls itself for each level."""
    try:
        depth = 0
        for number, event in enumerate(yaml.parse(text, Loader=_Parser), 1):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or number > 2 * MAX_ITEMS:
                line = event.start_mark.line + 1
                raise ConfigError(f"{origin} line {line}: the config has over {MAX_ITEMS} values or {MAX_DEPTH} levels")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{origin} line {mark.line + 1}" if mark else origin
        raise ConfigError(f"{place}: not valid YAML: {str(getattr(error, 'problem', None) or error)[:200]}") from None


class _Parser(yaml.SafeLoader):
    """Stops at brackets that are nested too deeply, in which scanner and parser call each other."""

    def fetch_flow_collection_start(self, token_class):
        if self.flow_level >= MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, f"more than {MAX_DEPTH} levels of brackets", self.get_mark())
        super().fetch_flow_collection_start(token_class)


class _TreeReader:
    """Turns YAML nodes into items; knows the file's name and how many nodes it has seen."""

    def __init__(self, origin: str):
        self.origin, self.count = origin, 0

    def read(self, node: yaml.Node, line: int, depth: int) -> Item:
        where = f"{self.origin} line {line}" if line else self.origin
        self.count += 1
        if self.count > MAX_ITEMS or depth > MAX_DEPTH:
            raise ConfigError(f"{where}: the config has over {MAX_ITEMS} values or {MAX_DEPTH} levels")
        if node.tag.startswith("!") or "python" in node.tag:
            raise ConfigError(f"{where}: the tag {node.tag[:80]!r} is not allowed; write plain YAML values")
        if isinstance(node, yaml.MappingNode):
            return Item(self._mapping(node, where, line, depth), where)
        if isinstance(node, yaml.SequenceNode):
            return Item([self.read(n, line and n.start_mark.line + 1, depth + 1) for n in node.value], where)
        return Item(_scalar(node), where)

    def _mapping(self, node: yaml.MappingNode, where: str, line: int, depth: int) -> dict[str, Item]:
        entries: dict[str, Item] = {}
        for key_node, value_node in node.value:
            key_line = line and key_node.start_mark.line + 1
            key = str(key_node.value)
            if key in entries:
                place = f"{self.origin} line {key_line}"
                raise ConfigError(f"{place}: key {key[:80]!r} was already given at {entries[key].where}")
            entries[key] = self.read(value_node, key_line, depth + 1)
        return entries


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.style in ("'", '"', "|", ">"):
        return text
    if _NULL.fullmatch(text):
        return None
    if text in ("true", "True", "false", "False"):
        return text in ("true", "True")
    if _INT.fullmatch(text) and len(text) < 40:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def parse_value(text: str, origin: str) -> Item:
    """The item of a value given on the command line, in YAML's flow style."""
    try:
        node = yaml.compose(text, Loader=_Parser)
    except yaml.YAMLError:
        return Item(text, origin)
    return Item(None, origin) if node is None else _TreeReader(origin).read(node, 0, 0)


def plain(item: Item) -> Any:
    """The tree without its places."""
    if isinstance(item.value, dict):
        return {key: plain(child) for key, child in item.value.items()}
    if isinstance(item.value, list):
        return [plain(child) for child in item.value]
    return item.value


def to_item(value: Any, where: str) -> Item:
    """A tree of plain values, all written at `where`."""
    if isinstance(value, dict):
        return Item({str(key): to_item(child, where) for key, child in value.items()}, where)
    if isinstance(value, (list, tuple)):
        return Item([to_item(child, where) for child in value], where)
    return Item(str(value) if isinstance(value, Path) else value, where)


def merge(base: Item, top: Item) -> Item:
    """`base` with the keys of `top` laid over it, mappings key by key and everything else whole."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    merged = dict(base.value)
    for key, child in top.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Item(merged, top.where)


def set_path(root: Item, path: list[str], leaf: Item) -> Item:
    """`root` with `leaf` at a dotted path; numbers index lists, missing mappings are made."""
    if not path:
        return leaf
    head, rest = path[0], path[1:]
    if isinstance(root.value, list):
        if not head.isdigit() or int(head) >= len(root.value):
            raise ConfigError(f"{leaf.where}: {head!r} is not an index of this list of {len(root.value)}")
        children = list(root.value)
        children[int(head)] = set_path(children[int(head)], rest, leaf)
        return Item(children, root.where)
    children = dict(root.value) if isinstance(root.value, dict) else {}
    children[head] = set_path(children.get(head, Item({}, leaf.where)), rest, leaf)
    return Item(children, root.where)


def kind_of(value: Any) -> str:
    """What a value is, in the words of a message."""
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value)) or brief(value)
