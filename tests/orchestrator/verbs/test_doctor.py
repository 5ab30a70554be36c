"""Claims about the doctor: it finds what is there, names what is wrong, and says what to do."""

import io
import json
import re
from importlib import metadata

import pytest

from orchestrator.verbs import doctor
from orchestrator.verbs.doctor import Diagnosis, Severity
from orchestrator.verbs.inputs.options import DoctorOptions
from orchestrator.views.console import Console


@pytest.fixture
def streams() -> tuple[io.StringIO, io.StringIO]:
    return io.StringIO(), io.StringIO()


def answer(streams: tuple[io.StringIO, io.StringIO], *, as_json: bool = False) -> int:
    console = Console(as_json=as_json, out=streams[0], err=streams[1])
    return doctor.main(DoctorOptions(as_json=as_json), console)


def found(findings: tuple[Diagnosis, ...], name: str) -> Diagnosis:
    return next(finding for finding in findings if finding.name == name)


def test_this_machine_is_ready(streams):
    assert answer(streams) == 0
    assert "CPU cores" in streams[0].getvalue()


def test_every_finding_that_is_not_ok_says_what_to_do():
    for finding in doctor.doctor():
        assert (finding.level is Severity.OK) == (finding.remedy == ""), finding


def test_all_that_is_needed_is_looked_at():
    needed = metadata.requires("orchestrate-chips") or []
    names = {re.split(r"[^A-Za-z0-9_-]", text)[0] for text in needed if "extra ==" not in text}
    assert names == {*doctor.REQUIRED, "torch", "ray"}


def test_the_json_has_every_finding(streams):
    answer(streams, as_json=True)
    document = json.loads(streams[0].getvalue())
    names = [finding["name"] for finding in document["findings"]]
    assert document["ready"] is True
    assert {"python", "torch", "CUDA devices", "ray", "transformers", "kernels package", "memory"} <= set(
        names
    )
    assert len(names) == len(set(names))


def test_a_failure_is_exit_code_one(streams, monkeypatch):
    broken = Diagnosis("thing", Severity.FAIL, "broken", "mend it")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([broken]),))
    assert answer(streams) == 1
    assert "mend it" in streams[0].getvalue()


def test_a_warning_is_not_a_failure(streams, monkeypatch):
    weak = Diagnosis("thing", Severity.WARN, "weak", "strengthen it")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([weak]),))
    assert answer(streams) == 0


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("2.13.0", Severity.OK),
        ("2.13.0+cpu", Severity.OK),
        ("2.13.1", Severity.FAIL),
        ("2.12.0", Severity.FAIL),
    ],
)
def test_only_one_torch_will_do(version, level):
    assert doctor.torch_version(version).level is level


def test_another_kernels_distribution_is_named():
    finding = doctor.kernels_clash(["orchestrate-chips", "kernels"])
    assert finding.level is Severity.FAIL
    assert "pip uninstall kernels" in finding.remedy


@pytest.mark.parametrize("owners", [[], ["orchestrate-chips"], ["orchestrate-chips", "orchestrate-chips"]])
def test_our_own_kernels_is_no_clash(owners):
    assert doctor.kernels_clash(owners).level is Severity.OK


@pytest.mark.parametrize(("free", "level"), [(9, Severity.WARN), (10, Severity.OK), (11, Severity.OK)])
def test_too_little_room_is_a_warning(free, level):
    assert doctor.room("room", free, 20, 10, "make room").level is level


@pytest.mark.parametrize(
    ("missing", "level"), [("ray", Severity.WARN), ("torch", Severity.FAIL), ("numpy", Severity.FAIL)]
)
def test_what_is_not_installed_is_named(monkeypatch, missing, level):
    real = metadata.version

    def version(name: str) -> str:
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert found(doctor.doctor(), missing).level is level


def test_a_torch_that_does_not_import_is_a_failure(monkeypatch):
    def refuse(name: str) -> None:
        raise ImportError(f"{name}: a library is missing")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    findings = doctor.doctor()
    assert found(findings, "torch import").level is Severity.FAIL
    assert "a library is missing" in found(findings, "ray").found
