"""User errors: three short parts, an exit code each, and several at once."""

import pickle

import pytest

from orchestrator import errors
from orchestrator.errors import ConfigError, FitError, HangError, PlanError, RunError, UserError, combined


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


def test_the_docstring_draws_every_error():
    kinds = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, UserError)
    ]
    assert len(kinds) == 10
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)
