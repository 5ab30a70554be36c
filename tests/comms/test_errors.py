"""User errors: three short parts, an exit code each, and several at once."""

import pickle
import re

import pytest

from comms import errors
from comms.errors import ConfigError, FitError, HangError, PlanError, RunError, UserError, combined, located

KINDS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, UserError)]


def test_an_error_reads_as_what_where_and_what_to_do():
    text = str(ConfigError("unknown key 'dpp'", "job.yaml:3", "did you mean 'dp'?"))
    assert text.splitlines() == ["unknown key 'dpp'", "  at: job.yaml:3", "  do: did you mean 'dp'?"]


@pytest.mark.parametrize(
    ("kind", "code"), [(ConfigError, 2), (PlanError, 2), (FitError, 3), (RunError, 1), (HangError, 4)]
)
def test_each_error_has_its_exit_code(kind, code):
    assert kind("p", "w", "h").exit_code == code


def test_several_errors_are_one_that_leads_the_others():
    found = [ConfigError(f"problem {i}", f"f:{i}", "mend it") for i in range(3)]
    error = combined(found)
    assert [finding.problem for finding in error.findings] == ["problem 0", "problem 1", "problem 2"]
    assert len(str(error).splitlines()) == 9


def test_an_error_survives_pickling():
    error = combined([PlanError("a", "b", "c"), PlanError("d", "e", "f")])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is PlanError
    assert str(again) == str(error)


def test_a_part_that_is_not_known_is_left_out():
    assert str(ConfigError("it broke")) == "it broke"
    assert str(ConfigError("it broke", hint="mend it")).splitlines() == ["it broke", "  do: mend it"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_keeps_its_parts_between_processes(kind):
    with pytest.raises(kind) as caught, located("here", "do this"):
        raise kind("it broke")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is kind
    assert (again.problem, again.where, again.hint) == ("it broke", "here", "do this")


def test_what_a_deeper_error_knows_stays():
    with (
        pytest.raises(UserError) as caught,
        located("file", "outer", {"size": "--size"}),
        located("line", ""),
    ):
        raise UserError("it broke", "size")
    assert (caught.value.where, caught.value.hint) == ("--size", "outer")


def test_the_docstring_draws_every_error_below_its_base():
    drawn = re.findall(r"^ {4}((?:[|] {3}| {4})*)(?:[+]-- )?(\w+)", errors.__doc__ or "", re.M)
    assert {name for _, name in drawn} == {kind.__name__ for kind in KINDS}
    for depth, name in drawn:
        kind = getattr(errors, name)
        assert len(kind.__mro__) - len(UserError.__mro__) == len(depth) // 4 + (kind is not UserError), name
