"""YAML files: the budgets of nesting and aliases, held whatever the release of PyYAML and the recursion limit."""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import ConfigError
from orchestrator.config import yaml_file
from orchestrator.config.yaml_file import MAX_DEPTH, MAX_NUMBER, parse_yaml

LOADERS = sorted({yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)}, key=str)
each_loader = pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
kinds = st.lists(st.booleans(), max_size=MAX_DEPTH * 3 // 4)  # of each level: a list, or a mapping


@contextlib.contextmanager
def budgets(loader: type, **limits: int) -> Iterator[None]:
    with mock.patch.multiple(yaml_file, _LOADER=loader, **limits):
        yield


def refusal_of(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "c.yaml")
    (finding,) = error.value.findings
    assert finding.hint
    return finding


def nested(blocks: list[bool], flows: list[bool]) -> tuple[str, object]:
    """A mapping around levels written as blocks, a line each, around levels in brackets on the last line."""
    lines = [" " * depth + ("-" if is_list else "k:") for depth, is_list in enumerate([False, *blocks])]
    opening = "".join("[" if is_list else "{k: " for is_list in flows)
    closing = "".join("]" if is_list else "}" for is_list in reversed(flows))
    value: object = 1
    for is_list in reversed([*blocks, *flows]):
        value = [value] if is_list else {"k": value}
    return "\n".join([*lines, " " * len(lines) + opening + "1" + closing]), {"k": value}


@each_loader
@given(blocks=kinds, flows=kinds)
def test_values_nest_up_to_the_budget_and_no_deeper(loader, blocks, flows):
    text, value = nested(blocks, flows)
    with budgets(loader):
        if 1 + len(blocks) + len(flows) <= MAX_DEPTH:
            assert parse_yaml(text, "c.yaml").root == value
        else:
            error = refusal_of(text)
            assert error.problem == f"lists or mappings nested more than {MAX_DEPTH} deep"
            assert error.where == f"c.yaml:{len(blocks) + 2}"


# Item k of a definition: the definition of that number if an earlier one, a scalar of that length otherwise.
definitions = st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=3, max_size=6)


def written_out(lists: list[list[int]]) -> list[list[object]]:
    """The definitions with copies of the earlier ones in place of aliases."""
    values: list[list[object]] = []
    for number, items in enumerate(lists):
        values.append([values[item] if item < number else "x" * (item + 1) for item in items])
    return values


def size(value: object) -> int:
    return 1 + (sum(map(size, value)) if isinstance(value, list) else len(str(value)))


def depth(value: object) -> int:
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@each_loader
@given(lists=definitions, most=st.integers(0, 100), limit=st.integers(2, 6))
def test_aliases_are_held_to_the_budgets_of_what_they_stand_for(loader, lists, most, limit):
    values, lines = written_out(lists), []
    repeated, deepest, first = 0, 0, None  # the line that is the first to go beyond
    for number, items in enumerate(lists):
        words = [f"*d{item}" if item < number else "x" * (item + 1) for item in items]
        lines.append(f"k{number}: &d{number} [{', '.join(words)}]")
        repeated += sum(size(values[item]) for item in items if item < number)
        deepest = max(deepest, 1 + depth(values[number]))
        if first is None and (repeated > most or deepest > limit):
            first = number + 1
    with budgets(loader, MAX_REPEATED=most, MAX_DEPTH=limit):
        if first is None:
            assert list(parse_yaml("\n".join(lines), "c.yaml").root.values()) == values
        else:
            error = refusal_of("\n".join(lines))
            assert error.where == f"c.yaml:{first}"
            assert error.problem in {
                f"lists or mappings nested more than {limit} deep",
                f"aliases repeat more than {most} characters",
            }


def bomb(opening: str, closing: str) -> str:
    """Ten lines that stand for ten billion values."""
    lines = ["- &d0 x"]
    for number in range(1, 11):
        items = ", ".join(f"{'' if opening == '[' else f'k{i}: '}*d{number - 1}" for i in range(10))
        lines.append(f"- &d{number} {opening}{items}{closing}")
    return "k:\n" + "\n".join(lines)


@each_loader
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{", "}")])
@pytest.mark.parametrize("last", ["", "\n- {? *d10 : 1}"])
def test_aliases_that_explode_are_refused_where_they_do(loader, opening, closing, last):
    with budgets(loader):
        error = refusal_of(bomb(opening, closing) + last)
    assert error.problem.startswith("aliases repeat more than")
    assert error.where == "c.yaml:8"  # the sixth line of ten aliases: 10 ** 6 values


@each_loader
@pytest.mark.parametrize("unit", ["[", "{k: ", "[{k: ", "- ", "? ", "[[],", "k: &a [*a, "])
@pytest.mark.parametrize("repeats", [1000, 100_000])
def test_no_depth_ends_the_process(loader, unit, repeats):
    """100000 brackets overflowed the stack of C up to PyYAML 6.0.3."""
    with budgets(loader), pytest.raises(ConfigError) as error:
        parse_yaml("k:\n " + unit * repeats, "c.yaml")
    assert error.value.where.startswith("c.yaml:")


@each_loader
def test_the_budget_of_depth_fits_into_little_stack(loader):
    text, value = nested([True] * (MAX_DEPTH // 2), [True] * (MAX_DEPTH // 2 - 1))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 5 * MAX_DEPTH)
    try:
        with budgets(loader):
            found = parse_yaml(text, "c.yaml").root
    finally:
        sys.setrecursionlimit(before)
    assert found == value


@pytest.mark.parametrize(
    "text",
    [
        "k: " + "1" * 1_000_000 + "x",
        "k: 1" + ":00" * 1_000_000,
        "k: 1" + ":00" * 1_000_000 + ".5",
        "k: 0b" + "1" * 1_000_000,
        "k: [" + "1, " * 50_000 + "]",
        "k: [" + "{}, " * 20_000 + "]",
        "".join(f"k{i}: &a{i} 1\n" for i in range(20_000)),
        "k: &a [" + "[*a], " * 20_000 + "]",
        "k: 1\n" * 20_000,
    ],
    ids=lambda text: text[:12].replace("\n", "|"),
)
def test_the_length_of_a_file_costs_no_more_than_its_length(text):
    """What takes the square of these lengths runs out of the time that a test has."""
    with contextlib.suppress(ConfigError):
        parse_yaml(text, "c.yaml")


@pytest.mark.parametrize(
    "value", ["1" + ":00" * 400 + ".5", "!!int ''", "!!bool word", "!!timestamp word", "1" * (MAX_NUMBER + 1)]
)
def test_what_only_looks_like_a_number_or_date_is_refused_with_its_line(value):
    error = refusal_of(f"a: 1\nb: {value}\n")
    assert error.problem.startswith("cannot read")
    assert error.where == "c.yaml:2"


@pytest.mark.parametrize(
    "value", ["010", "-012", "08", "0_1", "00.5", "012e3", "1:30", "2:1", "-1:30:15", "190:20.5"]
)
def test_a_number_that_yaml_1_1_reads_as_another_is_refused_with_its_line(value):
    error = refusal_of(f"a: 1\nb: {value}\n")
    assert (error.problem, error.where) == (
        f"cannot read {value!r} as a number: it begins with 0, or has a colon", "c.yaml:2",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "read"),
    [("0", 0), ("-0", 0), ("0.5", 0.5), ("0e3", 0.0), ("10_0", 100), ("0x10", 16), ("'010'", "010"), ("'1:30'", "1:30"),
     ("a:1", "a:1"), ("25 GB/s", "25 GB/s"), ("0-63", "0-63"), ("3e-4", 3e-4)],
)  # fmt: skip
def test_a_number_that_can_be_read_in_one_way_is_read(text, read):
    assert parse_yaml(f"a: {text}", "c.yaml").root["a"] == read


def test_a_key_that_is_not_text_is_refused_with_its_line():
    error = refusal_of("a: 1\n? [b, c]\n: 2\n")
    assert (error.problem, error.where) == ("a key that is a list or a mapping", "c.yaml:2")
