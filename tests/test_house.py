"""The house rules, as far as a machine can read them. CONTRIBUTING.md says them in words."""

import ast
import functools
import graphlib
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("comms", "kernels", "orchestrator", "partitioner")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
CLUSTERS = sorted((ROOT / "cluster_configs").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FOLDER_FILES = 12
MAX_LINES = 56_000  # of the four packages: more is a decision (47,400 before jobs, checkpoints of any plan and scaling)
MAX_DOOR_NAMES = 16
MAX_CLUSTER_LINES = 40
MAX_CONTRIBUTING_LINES = 80
REGISTERING = frozenset({"model_validator", "model_serializer"})
FILE_NAMES = re.compile(r"^(utils?|helpers?|common|misc)$")
CLASS_NAMES = re.compile(r"(Manager|Handler|Engine|Impl)$")
STUB_WORDS = re.compile(
    "|".join((r"\bTO" + "DO\b", "FIX" + "ME", "NotImplemented" + "Error", "for" + " now"))
)
PLACEHOLDER_VALUE = re.compile(r"\bplaceholder (value|number|implementation|text)\b")

# A new flag is a new promise. Prefer a key of the job file and --set; if it must be a flag, it is added here too.
FLAGS = frozenset(
    {
        "--address",
        "--algorithm",
        "--chips",
        "--cluster",
        "--data",
        "--dry-run",
        "--fidelity",
        "--follow",
        "--global-batch",
        "--job",
        "--json",
        "--measure",
        "--mode",
        "--model",
        "--op",
        "--out",
        "--plan",
        "--plot",
        "--resume",
        "--run-dir",
        "--runner",
        "--seq",
        "--set",
        "--size",
        "--steps",
        "--sweep",
        "--tiers",
        "--to",
        "--vary",
        "--verbose",
        "--verify-first",
        "--version",
        "--working-dir",
        "-v",
    }
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_door(path: Path) -> bool:
    """Whether it is what a folder says of itself."""
    return path.name == "__init__.py"


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_a_file_can_be_held_in_mind() -> None:
    sizes = {relative(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in sizes.items() if lines > MAX_FILE_LINES} == {}


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    folders = Counter(relative(path.parent) for path in (*SOURCES, *TESTS, *BENCHMARKS) if not is_door(path))
    assert {folder: files for folder, files in folders.items() if files > MAX_FOLDER_FILES} == {}


def test_the_packages_stay_within_their_lines() -> None:
    assert sum(len(path.read_text().splitlines()) for path in SOURCES) <= MAX_LINES


def test_a_function_fits_on_a_screen() -> None:
    sizes = {
        f"{relative(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in (*SOURCES, *TESTS, *BENCHMARKS)
        for node in functions_of(tree_of(path))
    }
    assert {name: lines for name, lines in sizes.items() if lines > MAX_FUNCTION_LINES} == {}


def test_everything_is_annotated() -> None:
    bare = [
        f"{relative(path)}: {missing}"
        for path in (*SOURCES, *BENCHMARKS)
        for node in functions_of(tree_of(path))
        for missing in unannotated(node)
    ]
    assert bare == []


def unannotated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    bare = [a.arg for a in (*named, *starred) if a.annotation is None and a.arg not in {"self", "cls"}]
    return [f"{node.name}({name})" for name in bare] + ([f"{node.name} ->"] if node.returns is None else [])


def test_names_say_what_a_thing_is() -> None:
    assert [relative(path) for path in SOURCES if FILE_NAMES.search(path.stem)] == []
    assert [name for name in class_places() if CLASS_NAMES.search(name)] == []


def test_no_class_name_means_two_things() -> None:
    assert {name: places for name, places in class_places().items() if len(places) > 1} == {}


def class_places() -> dict[str, list[str]]:
    """Where each class is defined; a leading underscore makes no other name."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(f"{relative(path)}:{node.lineno}")
    return places


def test_no_file_name_means_two_things() -> None:
    stems: dict[str, list[str]] = defaultdict(list)
    for path in SOURCES:
        if not is_door(path):
            stems[path.stem].append(relative(path))
    assert {stem: places for stem, places in stems.items() if len(places) > 1} == {}


def test_nothing_is_there_for_tests_only() -> None:
    """Every function, method and class is named somewhere else in the packages; a front door's list counts.

    So does a decorator of pydantic, which registers what it decorates.
    """
    used = {word for path in SOURCES for node in ast.walk(tree_of(path)) for word in words_of(node)}
    unused = [
        f"{relative(path)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        if node.name not in used and not node.name.startswith("__")
        if not any(
            REGISTERING & set(words_of(word)) for each in node.decorator_list for word in ast.walk(each)
        )
    ]
    assert unused == []


def words_of(node: ast.AST) -> tuple[str, ...]:
    """The names that a node uses; a text that could be a name is one, as in tables and in `getattr`."""
    match node:
        case ast.Name(id=word) | ast.Attribute(attr=word) | ast.keyword(arg=str(word)):
            return (word,)
        case ast.Constant(value=str(word)) if word.isidentifier():
            return (word,)
        case ast.MatchClass(kwd_attrs=words):
            return tuple(words)
    return ()


def test_source_is_ascii() -> None:
    files = (*SOURCES, *TESTS, *BENCHMARKS, *CLUSTERS)
    assert [relative(path) for path in files if not path.read_bytes().isascii()] == []


def test_a_module_says_what_it_is() -> None:
    assert [relative(path) for path in SOURCES if not ast.get_docstring(tree_of(path))] == []


def test_nothing_is_left_for_later() -> None:
    left = {
        relative(path): STUB_WORDS.findall(text) + PLACEHOLDER_VALUE.findall(text)
        for path in SOURCES
        for text in (path.read_text(),)
    }
    assert {path: words for path, words in left.items() if words} == {}


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Lazy imports and those for a type checker only count: a reader has to follow them too."""
    names = {module_of(path) for path in SOURCES}
    graph = {module_of(path): imports_in(tree_of(path), names) - {module_of(path)} for path in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def imports_in(tree: ast.Module, names: set[str]) -> set[str]:
    """Which of these modules it imports, anywhere."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in names else node.module)
    return found & names


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below this one that can run: the body of `if TYPE_CHECKING` never does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from executed(child)


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("import b", {"b"}),
        ("from b import value", {"b"}),
        ("def f():\n    from b import c", {"b.c"}),
        ("if TYPE_CHECKING:\n    import b", {"b"}),
        ("import elsewhere", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, imported: set[str]) -> None:
    assert imports_in(ast.parse(source), {"b", "b.c"}) == imported


@pytest.mark.parametrize("package", PACKAGES)
def test_a_front_door_has_about_a_dozen_names_and_each_leads_somewhere(package: str) -> None:
    module = importlib.import_module(package)
    names = module.__all__
    assert 6 <= len(names) <= MAX_DOOR_NAMES
    assert [name for name in names if getattr(module, name, None) is None] == []


def test_help_imports_neither_torch_nor_ray() -> None:
    loaded = modules_after(
        "import sys; sys.argv = ['orchestrate', '--help']", "from orchestrator import cli", "cli.main()"
    )
    assert "orchestrator.cli" in loaded
    assert loaded & {"torch", "ray", "transformers", "matplotlib", "numpy", "pydantic"} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_light_to_import(package: str) -> None:
    assert modules_after(f"import {package}") & {"torch", "ray", "numpy"} == set()


def modules_after(*lines: str) -> set[str]:
    """What a fresh interpreter has imported once these statements ran."""
    script = "\n".join(
        [
            "import atexit, sys",
            "atexit.register(lambda: print('\\n'.join(sys.modules), file=sys.stderr))",
            *lines,
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_the_flags_are_the_frozen_ones() -> None:
    typer_main = pytest.importorskip("typer.main")
    from orchestrator import cli

    group = typer_main.get_command(cli.build())
    declared = {
        name
        for command in (group, *group.commands.values())
        for parameter in command.params
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    assert declared - {"--help"} == FLAGS


def test_every_verb_has_a_main_that_takes_its_options_and_a_console() -> None:
    from orchestrator import cli

    for verb, options in cli.VERBS.items():
        tree = tree_of(ROOT / "orchestrator" / "verbs" / f"{verb}.py")
        mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        arguments = f"options: {options.__name__}, console: Console"
        assert [ast.unparse(main.args) for main in mains] == [arguments], verb


def test_a_shipped_cluster_loads_and_is_short() -> None:
    from orchestrator import load_cluster

    for path in CLUSTERS:
        assert load_cluster(path).name, path
        assert len(path.read_text().splitlines()) < MAX_CLUSTER_LINES, path


def test_clusters_are_shipped() -> None:
    assert {"laptop", "cpu", "dgx-a100", "dgx-h100-superpod"} <= {path.stem for path in CLUSTERS}


def test_the_version_is_never_taken_for_the_other_kernels_distribution() -> None:
    version = tuple(int(part) for part in PROJECT["project"]["version"].split(".")[:3])
    assert not (0, 18, 2) <= version < (0, 19)


def test_kernels_defines_no_version() -> None:
    tree = tree_of(ROOT / "kernels" / "__init__.py")
    assert "__version__" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_transformers_imports_beside_us_and_does_not_take_our_kernels_for_another() -> None:
    check = "from transformers.utils import is_kernels_available; assert not is_kernels_available()"
    assert "kernels" in modules_after("import kernels", check)


def test_torch_is_pinned_exactly() -> None:
    assert "torch==2.13.0" in PROJECT["project"]["dependencies"]


def test_every_dependency_has_a_lower_bound_and_the_lowest_versions_are_those() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    declared = [*PROJECT["project"]["dependencies"], *(each for extra in extras.values() for each in extra)]
    others = [each for each in declared if not each.startswith("orchestrate-chips[")]
    lowest = [re.sub(r"^([\w-]+)(?:\[\w+\])?[=>]=([\d.]+)(,<[\d.]+)?$", r"\1==\2", each) for each in others]
    assert (ROOT / ".ci" / "lowest.txt").read_text().splitlines() == lowest


def shell_commands(path: Path) -> list[str]:
    """The commands of the `sh` blocks of a page, one a line, `&&` taken apart."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [command.strip() for line in lines if line for command in line.split("&&")]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = [command for command in shell_commands(ROOT / "README.md") if command.startswith("pytest")]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands
    assert set(commands) <= set(script)
    assert "pip install --quiet --disable-pip-version-check '.[test]'" in script


def test_the_readme_names_only_verbs_flags_and_files_that_exist() -> None:
    from orchestrator import cli
    from orchestrator.config.hardware.cluster_file import cluster_path

    commands = [command.split() for command in shell_commands(ROOT / "README.md")]
    ours = [command for command in commands if command[0] == "orchestrate"]
    assert {"train", "simulate", "verify"} <= {command[1] for command in ours}
    for command in ours:
        assert command[1] in cli.VERBS
        assert {word for word in command if word.startswith("-")} <= FLAGS
        for word in command:
            assert "/" not in word or (ROOT / word).is_file(), word
        if "--cluster" in command and "/" not in (name := command[command.index("--cluster") + 1]):
            assert cluster_path(name).is_file()


def test_links_of_a_page_lead_somewhere() -> None:
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
        assert [link for link in links if not (path.parent / link).exists()] == [], path


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= MAX_CONTRIBUTING_LINES


def test_ci_and_the_makefile_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"setup", "check", "test", "bench"} <= set(targets)


def test_every_package_is_declared_to_the_build_and_to_the_tools() -> None:
    folders = {module_of(path) for path in SOURCES if path.name == "__init__.py"}
    declared = set(PROJECT["tool"]["setuptools"]["packages"]) - {"orchestrator.cluster_configs"}
    assert declared == folders
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == set(PACKAGES)
    assert set(PROJECT["tool"]["mypy"]["packages"]) == set(PACKAGES)
    assert set(PROJECT["tool"]["coverage"]["run"]["source_pkgs"]) == set(PACKAGES)


def test_the_contracts_name_modules_that_exist() -> None:
    known = {module_of(path) for path in SOURCES}
    named = {
        module
        for contract in PROJECT["tool"]["importlinter"]["contracts"]
        for key in ("layers", "protected_modules", "allowed_importers", "source_modules")
        for entry in contract.get(key, [])
        for module in entry.split(" | ")
        if "containers" not in contract  # `exhaustive` checks those
    }
    assert named - known - {"torch", "ray"} == set()


def test_the_modules_that_may_import_torch_or_ray_do() -> None:
    """A permission that nobody uses is taken back."""
    for contract in PROJECT["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "protected" and contract["protected_modules"][0] in {"torch", "ray"}:
            package = contract["protected_modules"][0]
            users = {module_of(path) for path in SOURCES if uses(tree_of(path), package)}
            assert set(contract["allowed_importers"]) - users == set()


def uses(tree: ast.Module, package: str) -> bool:
    absolute = [node.module for node in executed(tree) if isinstance(node, ast.ImportFrom) and node.module]
    plain = [alias.name for node in executed(tree) if isinstance(node, ast.Import) for alias in node.names]
    return any(name.split(".")[0] == package for name in (*absolute, *plain))
