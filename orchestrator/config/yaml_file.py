"""YAML files with places: every key knows its file and line, and no key may stand twice.

Guarantees: plain mappings, lists and scalars only (no tags that build objects); `3e-4` is a number, which
YAML 1.1 alone would read as text. All duplicate keys of a file are reported at once.
Not supported: values that contain themselves by an alias, merge keys (`<<`), and keys that are not text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from comms.errors import ConfigError, combined

Location = tuple[str | int, ...]

_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Document:
    """The content of one file, and where each of its keys and items stands."""

    origin: str  # the file, or what stands in for one
    root: dict[str, object]
    places: Mapping[Location, str]  # "file:line" of each key and item

    def where(self, location: Location) -> str:
        """The place of `location`, or of the nearest key around it."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.places:
                return self.places[location[:length]]
        return self.origin


def read_yaml(path: Path) -> Document:
    """The mapping in the file at `path`. Raises ConfigError where there is none, or keys stand twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ConfigError(f"cannot read the file: {reason}", str(path), "check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError("the file is not UTF-8 text", str(path), "give a YAML file") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> Document:
    """The mapping in `text`; `origin` names it in messages."""
    loader = _LOADER(text)
    reader = _NodeReader(loader, origin)
    try:
        node = loader.get_single_node()
        root = {} if node is None else reader.value(node, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = f"not valid YAML: {error.problem or error.context}"
        raise ConfigError(problem, f"{origin}:{line}", "check indentation, quotes and brackets") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", origin, "give a plain text YAML file") from error
    except RecursionError:
        problem = "lists or mappings nested hundreds deep"
        raise ConfigError(problem, origin, "check brackets; files of ours nest a few deep") from None
    finally:
        loader.dispose()
    if reader.errors:
        raise combined(reader.errors)
    if not isinstance(root, dict):
        raise ConfigError(
            "the file is not a mapping of keys to values", f"{origin}:1", "write `key: value` lines"
        )
    return Document(origin, root, reader.places)


def parse_scalar(text: str, origin: str) -> object:
    """One YAML value, such as the right side of an override."""
    return parse_yaml(f"value: {text}", origin).root["value"]


class _NodeReader:
    """Builds plain values from a node graph and notes where they stood."""

    def __init__(self, loader: yaml.SafeLoader, origin: str) -> None:
        self._loader = loader
        self._origin = origin
        self._open: set[int] = set()  # nodes that are being read: an alias in one may lead back to it
        self.places: dict[Location, str] = {}
        self.errors: list[ConfigError] = []

    def value(self, node: yaml.Node, location: Location) -> object:
        if isinstance(node, yaml.ScalarNode):
            is_number = not node.style and node.tag.endswith(":str") and _FLOAT.fullmatch(node.value)
            try:
                return float(node.value) if is_number else self._loader.construct_object(node)
            except ValueError as error:  # a date that there is not, !!int of a word
                hint = "put it in quotes if it is text"
                self.errors.append(
                    ConfigError(f"cannot read {node.value!r}: {error}", self._place(node), hint)
                )
                return None
        if id(node) in self._open:
            problem, hint = "a value that contains itself", "write it out: no alias inside of what it names"
            self.errors.append(ConfigError(problem, self.places[location], hint))
            return None
        self._open.add(id(node))
        found = (
            self._mapping(node, location)
            if isinstance(node, yaml.MappingNode)
            else self._list(node, location)
        )
        self._open.remove(id(node))
        return found

    def _list(self, node: yaml.Node, location: Location) -> list[object]:
        return [self._item(item, (*location, index)) for index, item in enumerate(node.value)]

    def _item(self, node: yaml.Node, location: Location) -> object:
        self.places[location] = self._place(node)
        return self.value(node, location)

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, object]:
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            place = self._place(key_node)
            if key in found:
                first = self.places[(*location, key)]
                where = f"{place} (first at {first})"
                self.errors.append(
                    ConfigError(f"the key {key!r} stands twice", where, "remove one of the two")
                )
                continue
            self.places[(*location, key)] = place
            found[key] = self.value(value_node, (*location, key))
        return found

    def _place(self, node: yaml.Node) -> str:
        return f"{self._origin}:{node.start_mark.line + 1}"
