"""YAML files with places: every key knows its file and line, and no key may stand twice.

Guarantees: plain mappings, lists and scalars only (no tags that build objects); `3e-4` is a number, which
YAML 1.1 alone would read as text. All duplicate keys of a file are reported at once. How many values there are, how
deep they nest and how much aliases repeat is held to budgets of our own, in one pass over the events: libyaml refuses
deep values from 0.2.6 on, before it their recursion ended the process, and no release of it looks at aliases.
Not supported: values that contain themselves by an alias, merge keys (`<<`), and keys that are not text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from comms.errors import ClusterError, ConfigError, combined
from comms.text_files import read_text

Location = tuple[str | int, ...]

# Lists and mappings within each other, aliases written out. What we ship nests up to 7 deep; composing, reading and
# checking take at most 4 frames a level, so that this depth fits into the 1000 frames that every Python allows.
MAX_DEPTH = 64
# Characters that aliases add, written out: a host of 500 characters given by alias 2000 times, far beyond any file
# of ours, read in a second or two. Nine lines of nine aliases each would otherwise make a billion values.
MAX_REPEATED = 1_000_000
# Scalars, lists and mappings, keys too: edges by the ten thousand. So many are read in a second or two.
MAX_VALUES = 100_000
# Characters of a number: Python's own limit for whole ones, as reading them takes the square of the length.
MAX_NUMBER = 4300
MAX_WHOLE = (
    2**64
)  # beyond it whole numbers are slips, and sums and messages of them a burden to all that follows

_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
# What YAML 1.1 alone takes for other numbers than are written: 010 is 8 there, 1:30 is 90.
_MISREAD = re.compile(
    r"[-+]?0[0-9_]+(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*(?::[0-9]+)+(?:\.[0-9_]*)?"
)


@dataclass(frozen=True, slots=True)
class Document:
    """The content of one file, where each of its keys and items stands, and which part of it is meant."""

    origin: str  # the file, or what stands in for one
    root: dict[str, object]
    places: Mapping[Location, str]  # "file:line" of each key and item
    at: Location = ()  # the part

    def inside(self, *keys: str | int) -> "Document":
        """The part at those keys within it, from one into the next."""
        return replace(self, at=(*self.at, *keys))

    def where(self, *keys: str | int) -> str:
        """The place of the part, or of those keys within it; else of the nearest key inside of it, or around it."""
        location = (*self.at, *keys)
        for length in range(len(location), 0, -1):
            if (part := location[:length]) in self.places:
                return self.places[part]
            if inside := [
                at for at in self.places if at[:length] == part
            ]:  # `a`, of which only `a.b` was given
                return self.places[inside[-1]]
        return self.origin

    def error(self, problem: str, hint: str, *keys: str | int) -> ClusterError:
        """What is wrong there, beyond what a schema sees."""
        return ClusterError(problem, self.where(*keys), hint)


def read_yaml(path: Path) -> Document:
    """The mapping in the file at `path`. Raises ConfigError where there is none, or keys stand twice."""
    return parse_yaml(read_text(path, "give a YAML file"), str(path))


def parse_yaml(text: str, origin: str) -> Document:
    """The mapping in `text`; `origin` names it in messages."""
    loader = _LOADER(text)
    reader = _NodeReader(loader, origin)
    try:
        _hold_to_budgets(text, origin)
        node = loader.get_single_node()
        root = {} if node is None else reader.value(node, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        # libyaml 0.2.6 looks 1024 characters ahead for a colon: it meets a thousand brackets before we see events.
        if "nesting" in (error.problem or ""):
            raise _too_deep(f"{origin}:{line}") from None
        problem = f"not valid YAML: {error.problem or error.context}"
        raise ConfigError(problem, f"{origin}:{line}", "check indentation, quotes and brackets") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", origin, "give a plain text YAML file") from error
    finally:
        loader.dispose()
    if reader.errors:
        raise combined(reader.errors)
    if not isinstance(root, dict):
        problem = "the file is not a mapping of keys to values"
        raise ConfigError(problem, f"{origin}:1", "write `key: value` lines")
    return Document(origin, root, reader.places)


def parse_scalar(text: str, origin: str) -> object:
    """One YAML value, such as the right side of an override; `origin` says all of its place."""
    try:
        return parse_yaml(f"value: {text}", origin).root["value"]
    except ConfigError as error:
        for each in error.findings:
            each.where = origin
        raise


@dataclass(slots=True)
class _Extent:
    """How far a value reaches, aliases written out."""

    anchor: str | None
    size: int  # characters, at least
    depth: int = 0  # lists and mappings within each other

    def hold(self, part: "_Extent") -> None:
        self.size += part.size
        self.depth = max(self.depth, part.depth + 1)


def _hold_to_budgets(text: str, origin: str) -> None:
    """Raise ConfigError where values are too many, nest too deep or repeat too much. Linear in `text`, no recursion."""
    opened = [_Extent(None, 0)]  # around the next event; the first is the document
    anchored: dict[str | None, _Extent] = {}  # an alias of none, or of one that is open, is refused later
    repeated = values = 0
    for event in yaml.parse(text, Loader=_LOADER):
        ended: _Extent | None = None
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Extent(event.anchor, 1, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = opened.pop()
        elif isinstance(event, yaml.ScalarEvent):
            ended = _Extent(event.anchor, 1 + len(event.value))
        elif isinstance(event, yaml.AliasEvent):
            ended = anchored.get(event.anchor, _Extent(None, 1))
            repeated += ended.size
        if ended:
            anchored[ended.anchor] = ended
            opened[-1].hold(ended)
        values += isinstance(event, yaml.NodeEvent)
        where = f"{origin}:{event.start_mark.line + 1}"
        if values > MAX_VALUES:
            problem = f"more than {MAX_VALUES} values, keys included"
            raise ConfigError(problem, where, "say it in fewer: `count`, `repeat`, ranges of chips, shapes")
        if len(opened) - 1 + (ended.depth if ended else 0) > MAX_DEPTH:
            raise _too_deep(where)
        if repeated > MAX_REPEATED:
            problem = f"aliases repeat more than {MAX_REPEATED} characters"
            raise ConfigError(problem, where, "use fewer aliases, or name smaller parts")


def _too_deep(where: str) -> ConfigError:
    problem = f"lists or mappings nested more than {MAX_DEPTH} deep"
    return ConfigError(problem, where, "check brackets, indentation and aliases")


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
            return self._scalar(node)
        if id(node) in self._open:
            problem, hint = "a value that contains itself", "write it out: no alias inside of what it names"
            self.errors.append(ConfigError(problem, self.places[location], hint))
            return None
        self._open.add(id(node))
        read = self._mapping if isinstance(node, yaml.MappingNode) else self._list
        found = read(node, location)
        self._open.remove(id(node))
        return found

    def _scalar(self, node: yaml.ScalarNode) -> object:
        is_text = node.tag.endswith(":str")
        if len(node.value) > MAX_NUMBER and not is_text:
            problem = f"cannot read a value of {len(node.value)} characters that is not text"
        elif not node.style and _MISREAD.fullmatch(node.value) and not (is_text and ":" in node.value):
            problem = f"cannot read {node.value!r} as a number: it begins with 0, or has a colon"
        else:
            is_number = is_text and not node.style and _FLOAT.fullmatch(node.value)
            try:
                value = float(node.value) if is_number else self._loader.construct_object(node)
                if not isinstance(value, int) or abs(value) < MAX_WHOLE:
                    return value
                problem = f"a whole number of {len(node.value)} characters, which is beyond 2^64"
            # A date that there is not, 1:00:00.5 of days without end, !!int of a word, !!bool of one, !!timestamp
            except (ArithmeticError, AttributeError, LookupError, ValueError) as error:
                problem = f"cannot read {node.value!r}: {error}"
        self.errors.append(ConfigError(problem, self._place(node), "put it in quotes if it is text"))
        return None

    def _list(self, node: yaml.Node, location: Location) -> object:
        found: list[object] = []
        for index, item in enumerate(node.value):
            self.places[(*location, index)] = self._place(item)
            found.append(self.value(item, (*location, index)))
        return found

    def _mapping(self, node: yaml.Node, location: Location) -> object:
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            key, place = key_node.value, self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key that is a list or a mapping"
                self.errors.append(ConfigError(problem, place, "write a word before the colon"))
                continue
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
