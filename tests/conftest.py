"""What every package's tests share: tiny models, Programs made from them, a cache folder of our own, one thread."""

import copy
import functools
import gc
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

# The same examples in every run; `--hypothesis-profile=search` looks for new ones.
REPEATABLE = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", REPEATABLE)
settings.register_profile("search", REPEATABLE, derandomize=False, print_blob=True)
settings.load_profile("repeatable")

TINY: Mapping[str, object] = {"layers": 2, "width": 32, "heads": 4, "vocab": 64, "max_seq": 16}
SEQ = 16
BATCH = 8
LOOPS = "compiled_loops"
RAY = "@pytest.mark.ray"
MOVING = {"benchmarks", "comms", "orchestrator"}  # folders of tests that move messages
LONG = "verification"  # the folder whose files take longest
COMPILER = Path(__file__).parents[1] / "benchmarks" / "tools" / "compile_loops.py"
ON_SIGTERM = signal.getsignal(signal.SIGTERM)  # before any Ray
compiling: list[subprocess.Popen[bytes]] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """What moves messages waits for the compiled loops and comes last; a process of its own compiles meanwhile.

    Ray, which starts many processes, comes in between. Long files come before short ones: all workers end together.
    """
    here = Path(__file__).parent
    moving = [item for item in items if item.path.relative_to(here).parts[0] in MOVING]
    for item in moving:
        item.fixturenames.insert(0, LOOPS)
    items.sort(key=lambda item: turn(item.path, LOOPS in item.fixturenames))
    worker = getattr(config, "workerinput", {"workerid": "gw0"})["workerid"]
    if moving and worker == "gw0" and not config.option.collectonly:
        compiling.append(subprocess.Popen([sys.executable, COMPILER]))


def pytest_collection_finish() -> None:
    """What is imported stays: looking through it for garbage again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()


def turn(file: Path, moves: bool) -> tuple[int, bool]:
    """When a file comes: first what needs no loops, then Ray, then what is long, then the rest."""
    return (1, False) if starts_ray(file) else (2 * moves, file.parent.name != LONG)


@functools.cache
def starts_ray(file: Path) -> bool:
    """Whether a test of the file does. By its text, as who hands out tests has not collected them."""
    return RAY in file.read_text()


class FileByFile(LoadFileScheduling):
    """What a module sets up is set up once; files that start Ray share a worker, as two Rays at once are slow."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return RAY if starts_ray(self.config.rootpath / file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileByFile:
    """Files in the order of collection, one worker each."""
    config.option.loadscopereorder = False
    return FileByFile(config, log)


def pytest_sessionfinish() -> None:
    """Leaves nothing running, as where the tests were stopped early."""
    for process in compiling:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def compiled_loops() -> None:
    """The loops of full fidelity, loaded. On a machine that has not run them yet this takes its time, once."""
    from tools.compile_loops import compile_loops

    compile_loops()


@pytest.fixture(scope="session")
def local_ray() -> None:
    """A Ray of two cores, for all tests with actors that need not start it themselves; see below for its end."""
    import ray

    even = {"worker_niceness": 0}  # beside the other worker's tests
    ray.init(
        "local",
        _system_config=even,
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Ends the shared Ray after the last test with actors: idle, it would take its share of the cores."""
    yield
    is_last = starts_ray(item.path) and (nextitem is None or not starts_ray(nextitem.path))
    if is_last and (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()
        # Ray and its raylets have one of their own, which would outlive them
        signal.signal(signal.SIGTERM, ON_SIGTERM)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Programs made here are kept for this run only, never in the user's cache; compiled loops are the user's."""
    from comms.simulation.jit import FOLDER  # by the environment as it is before the next lines

    folder = tmp_path_factory.mktemp("cache")
    (folder / "orchestrate").mkdir()
    if FOLDER:
        (folder / "orchestrate" / Path(FOLDER).name).symlink_to(FOLDER, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained_alike(laptop: Any, one_thread: None) -> Callable[..., Any]:
    """Trains `module` over the batches by a plan, and a copy as plain PyTorch does: losses are equal, and at the end
    all parameters and buffers. Returns the distributed step."""
    import torch

    from orchestrator.verbs.distribute import distribute

    def train(
        module: Any, batches: Iterable[Mapping[str, Any]], plan: Any, *, kind: Any = torch.optim.SGD, rel: float = 1e-9,
        around: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(), **settings: Any,
    ) -> Any:  # fmt: skip
        plain = copy.deepcopy(module)
        own, other = (kind(m.parameters(), **{"lr": 0.1, **settings}) for m in (module, plain))
        step = distribute(module, own, laptop, plan=plan, chips=plan.num_chips)
        for number, batch in enumerate(batches):
            with around(number):
                other.zero_grad()
                loss = plain(**batch)
                loss.backward()
                other.step()
            assert step(batch) == pytest.approx(loss.item(), rel=rel), f"step {number}"
        step.sync()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(
                module.state_dict()[name],
                value,
                rtol=rel,
                atol=rel / 10,
                msg=lambda said, n=name: f"{n}: {said}",
            )
        return step

    return train


@pytest.fixture(scope="session")
def tiny_model(one_thread: None) -> Callable[..., Any]:
    """A BuiltModel: the two-layer GPT of a given dtype, device and options."""
    import torch

    from orchestrator.models.model_builder import build

    def make(
        device: str = "meta", dtype: Any = torch.float32, name: str = "builtin:gpt-nano", **options: object
    ) -> Any:
        args = {**TINY, **options} if name.startswith("builtin:") else options
        return build(name, args, device=device, dtype=dtype, seed=0)

    return make


@pytest.fixture(scope="session")
def tiny_graph(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """The captured graph of the two-layer GPT for `samples` samples."""
    from partitioner.capture.graph_units import capture_graph

    @functools.cache
    def make(samples: int = 2, min_units: int = 1, dp: int = 1, microbatches: int = 1, **options: Any) -> Any:
        model = tiny_model(**options)
        batch = model.example_batch(samples * dp * microbatches, SEQ)
        return capture_graph(
            model.module, batch, dp=dp, microbatches=microbatches, tp_plan=model.tp_plan, min_units=min_units
        )

    return make


@pytest.fixture(scope="session")
def tiny_program(tiny_graph: Callable[..., Any]) -> Callable[..., Any]:
    """The Program of the two-layer GPT for a plan; microbatches of two samples."""
    from partitioner.layout.parallel_plan import Plan
    from partitioner.lowering.lower import StepShape, lower

    @functools.cache
    def make(options: tuple[tuple[str, Any], ...] = (), **degrees: Any) -> Any:
        plan = Plan(**degrees)
        graph = tiny_graph(2, plan.pp, plan.dp, plan.microbatches, **dict(options))
        dtype = str(next(iter(graph.specs.values())).dtype)
        return lower(graph, plan, StepShape(2 * plan.dp * plan.microbatches, SEQ, "tiny", dtype, 2))

    return make


@pytest.fixture(scope="session")
def tiny_job() -> Callable[..., Any]:
    """A Job for the two-layer GPT; further `key=value` overrides follow."""
    from orchestrator.config.job_file import load_job

    def make(*overrides: str) -> Any:
        args = "{" + ", ".join(f"{k}: {v}" for k, v in TINY.items()) + "}"
        base = [
            f"model_args={args}",
            "model=builtin:gpt-nano",
            f"seq={SEQ}",
            f"global_batch={BATCH}",
            "steps=4",
        ]
        return load_job(None, (*base, *overrides))

    return make


@pytest.fixture(scope="session")
def laptop() -> Any:
    """The shipped laptop cluster."""
    from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster

    return load_cluster(cluster_path("laptop"))


@pytest.fixture(scope="session")
def running_chips(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """All chips of a Program made by `tiny_program`, with the model's start values."""
    from kernels.optimizers import OptimizerSpec
    from orchestrator.planning.preparation import module_values
    from orchestrator.runners.executing.chip_set import ChipSet
    from orchestrator.runners.runner import Settings

    def make(
        program: Any, options: Mapping[str, Any] | None = None, workers: int = 1, clip: float | None = 1.0
    ) -> Any:
        module = tiny_model("cpu", **(options or {})).module
        settings = Settings(OptimizerSpec("adamw", lr=1e-2), clip)
        chips = ChipSet(program, settings, workers)
        chips.load(module_values(module).__getitem__)
        return chips

    return make


@pytest.fixture(scope="session")
def batches_of() -> Callable[..., Any]:
    """Random batches for every replica and microbatch of a Program, the same tokens for any split."""
    import torch

    def make(program: Any, number: int = 0) -> Any:
        generator = torch.Generator().manual_seed(number)
        samples, dp = int(program.facts["samples"]), program.size("dp")
        tokens = torch.randint(0, 64, (samples, SEQ + 1), generator=generator)
        parts = tokens.chunk(dp * program.microbatches)
        return {
            replica: {
                (microbatch, name): parts[replica * program.microbatches + microbatch][:, cut]
                for microbatch in range(program.microbatches)
                for name, cut in (("input_ids", slice(0, SEQ)), ("labels", slice(1, SEQ + 1)))
            }
            for replica in range(dp)
        }

    return make


@pytest.fixture(scope="session")
def violations() -> Callable[[Any], tuple[str, ...]]:
    """What is impossible in a timeline, one sentence each.

    Spans that end before they start, that overlap in one lane of one chip, flows without a span at one end, and
    recvs that end before their send starts.
    """

    def lane_of(span: Any) -> tuple[int, str]:
        return span.chip, span.lane

    def find(timeline: Any) -> tuple[str, ...]:
        spans = tuple(timeline.spans)
        found = [f"{span} ends before it starts" for span in spans if span.end_ns < span.start_ns]
        busy = [span for span in spans if span.end_ns > span.start_ns]
        busy.sort(key=lambda span: (lane_of(span), span.start_ns, span.end_ns))
        found += [
            f"{one} overlaps {other}"
            for one, other in pairwise(busy)  # if any two of a lane overlap, two neighbours do
            if lane_of(one) == lane_of(other) and other.start_ns < one.end_ns
        ]
        first = {(span.step, span.microbatch, span.chip, span.instr): span for span in reversed(spans)}
        for flow in timeline.flows:
            send = first.get((flow.step, flow.microbatch, flow.source_chip, flow.source_instr))
            recv = first.get((flow.step, flow.microbatch, flow.target_chip, flow.target_instr))
            if send is None or recv is None:
                found.append(f"{flow} has no span at one end")
            elif recv.end_ns < send.start_ns:
                found.append(f"{recv} ends before its send {send} starts")
        return tuple(found)

    return find
