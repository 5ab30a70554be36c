"""checkpoint: what a run has saved, whether it is whole, and the same in files of others.

`ls` reads manifests and the sizes of files, `verify` every byte. `convert` writes a model's tensors as safetensors, as
a folder of transformers (of a run whose model is hf:...), or as a folder of torch.distributed.checkpoint, which holds
the optimizer too, so that it becomes a checkpoint again (`--to checkpoint`). What is read may be any of these. Nothing
is overwritten, and what is written is there whole or not at all.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from comms.errors import ConfigError, ModelError, RunError
from comms.units import DASH, format_duration, format_scaled
from orchestrator.config.job_file import job_from
from orchestrator.config.yaml_file import Document
from orchestrator.models.hf_weights import without_talk
from orchestrator.models.model_specs import SourceKind, parse_model
from orchestrator.planning.job_parts import build_model
from orchestrator.planning.start_weights import started_from
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.checkpoints.formats import Weights, described, read, write_dcp, write_safetensors
from orchestrator.runs.disk import explained
from orchestrator.runs.run_dir import RunDir
from orchestrator.verbs.inputs.options import CheckpointAction, CheckpointOptions, CheckpointTarget
from orchestrator.views.console import Console, Table


def main(options: CheckpointOptions, console: Console) -> int:
    """The `checkpoint` verb."""
    if options.action is CheckpointAction.CONVERT:
        return _convert(options, console)
    for flag, value in (("TARGET", options.target), ("--to", options.to)):
        if value is not None:
            raise ConfigError(f"{flag} has no effect on {options.action}", flag, "leave it out, or convert")
    folders = _folders(options.source)
    is_full = options.action is CheckpointAction.VERIFY
    found = []
    for folder in folders:
        with console.phase(f"read {folder.name}"):
            found.append(_looked_at(folder, time.time(), is_full=is_full))
    console.results({"checkpoints": found}, [_table(options.source, found, is_full=is_full)])
    return 0 if not is_full or all(each["problem"] is None for each in found) else RunError.exit_code


def _folders(source: Path) -> list[Path]:
    """The checkpoint that this is, or those of a run, oldest first. Raises ConfigError where there is none."""
    if (source / checkpoint.MANIFEST).exists():
        return [source]
    found = checkpoint.newest_first(source / "checkpoints")[::-1]
    if not found:
        is_run = RunDir(source).config.is_file()
        problem = "the run has no checkpoint yet" if is_run else "this is neither a run nor a checkpoint"
        raise ConfigError(problem, str(source), "give a run's folder, or one of its checkpoints/step-...")
    return found


def _looked_at(folder: Path, now_s: float, *, is_full: bool) -> dict[str, object]:
    """What there is to say of one, as JSON values; `problem` is None where it is whole."""
    row: dict[str, object] = {"folder": str(folder)}
    try:
        manifest = checkpoint.read_manifest(folder)
        row |= {
            "step": manifest.step, "steps": manifest.steps, "plan": str(manifest.planned), "seed": manifest.seed,
            "age_s": max(now_s - (folder / checkpoint.MANIFEST).stat().st_mtime, 0.0),
            "nbytes": sum(each.nbytes for each in manifest.files), "tensors": len(manifest.tensors),
        }  # fmt: skip
        (checkpoint.open_checkpoint if is_full else checkpoint.require_sizes)(folder)
    except RunError as error:
        return {**row, "problem": error.problem}
    return {**row, "problem": None}


def _table(source: Path, found: list[dict[str, object]], *, is_full: bool) -> Table:
    rows = []
    for each in found:
        step, age, nbytes = each.get("step"), each.get("age_s"), each.get("nbytes")
        rows.append((
            Path(str(each["folder"])).name, DASH if step is None else f"{step}/{each['steps']}",
            format_duration(age) if isinstance(age, float) else DASH,
            format_scaled(float(nbytes), "B") if isinstance(nbytes, int) else DASH,
            str(each.get("plan", DASH)), str(each["problem"] or ("whole" if is_full else "complete")),
        ))  # fmt: skip
    return Table(f"checkpoints of {source}", rows, ("folder", "step", "age", "size", "saved under", "state"))


def _convert(options: CheckpointOptions, console: Console) -> int:
    source, target, kind = options.source, options.target, options.to
    if target is None or kind is None:
        known = "|".join(CheckpointTarget)
        raise ConfigError("convert needs a TARGET and --to", "checkpoint convert", f"add TARGET --to {known}")
    if target.exists():
        raise ConfigError("the target exists, and is not overwritten", str(target), "give another name")
    with console.phase(f"read {source}"):
        weights = read(source)
    with console.phase(f"write {target}"):
        WRITERS[kind](weights, source, target)
    document = {**described(weights), "from": str(weights.where), "to": str(target), "as": kind.value}
    size, count = format_scaled(float(str(document["nbytes"])), "B"), document["tensors"]
    rows = [("from", f"{weights.where} ({weights.format})"), ("to", f"{target} ({kind})"),
            ("the model", f"{count} tensors, {size}")]  # fmt: skip
    console.results(document, [Table("converted", rows)])
    return 0


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A name beside the target, which becomes it once all is written."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _drop(partial)
        yield partial
        with explained(target):
            partial.rename(target)
    except BaseException:
        _drop(partial)
        raise


def _drop(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to_safetensors(weights: Weights, source: Path, target: Path) -> None:
    """A file, or a folder with one where the target's name is none of a file."""
    del source
    with _whole(target) as partial:
        if target.suffix == ".safetensors":
            write_safetensors(partial, weights.tensors)
        else:
            with explained(target):
                partial.mkdir()
            write_safetensors(partial / "model.safetensors", weights.tensors)


def _to_dcp(weights: Weights, source: Path, target: Path) -> None:
    del source
    with _whole(target) as partial:
        write_dcp(partial, weights)


def _to_checkpoint(weights: Weights, source: Path, target: Path) -> None:
    if weights.state is None or weights.manifest is None:
        problem = (
            "it holds weights alone, and a checkpoint has the optimizer's states and what the run was, too"
        )
        raise ModelError(problem, str(source), f"start a run from it: --set weights={source}")
    with _whole(target) as partial:
        made = checkpoint.save(partial, weights.manifest, weights.state)
        with explained(target):
            for path in made.folder.iterdir():
                path.rename(partial / path.name)
            made.folder.rmdir()


def _to_hf(weights: Weights, source: Path, target: Path) -> None:
    """As transformers saves it; the run says which model it is."""
    run = next(
        (RunDir(each) for each in (source, *source.parents[:2]) if RunDir(each).config.is_file()), None
    )
    if run is None:
        hint = "give a run or a checkpoint in it; its run.yaml has the model's configuration"
        raise ModelError("nothing says which model of transformers it is", str(source), hint)
    job = job_from(Document(str(run.config), _job_of(run), {}))
    if parse_model(job.model).kind is not SourceKind.HF:
        hint = "convert it --to safetensors, which has all tensors under their names"
        raise ModelError(f"the run's model is {job.model}, none of transformers", str(run.config), hint)
    model = started_from(build_model(job, "cpu"), str(weights.where))
    with _whole(target) as partial, explained(target), without_talk():
        model.module.save_pretrained(str(partial))  # type: ignore[operator]


def _job_of(run: RunDir) -> dict[str, object]:
    job = run.read_config().get("job")
    if not isinstance(job, dict):
        raise ConfigError(
            "not the configuration of a run", str(run.config), "give a folder that `train` made"
        )
    return job


WRITERS: Mapping[CheckpointTarget, Callable[[Weights, Path, Path], None]] = {
    CheckpointTarget.CHECKPOINT: _to_checkpoint,
    CheckpointTarget.SAFETENSORS: _to_safetensors,
    CheckpointTarget.HF: _to_hf,
    CheckpointTarget.DCP: _to_dcp,
}
