"""Run every recipe from every seed, in parallel and resumable, writing each record as it comes."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from mgs_core._arguments import integer
from mgs_core._errors import ArgumentError, MgsError, writing
from mgs_core._registry import get_backend
from mgs_core.experiments.checks import warn_of_units
from mgs_core.experiments.networks import check_fit, is_file
from mgs_core.experiments.provenance import definition, other_versions, versions
from mgs_core.experiments.recipes import RECIPES, Recipe
from mgs_core.experiments.settings import Settings
from mgs_core.experiments.training import train
from mgs_core.experiments.tuning import TRIAL_SEED, best_strength, strengths, try_strength
from mgs_core.monitor import JSONLinesSink

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]  # its absence

Record: TypeAlias = dict[str, Any]
#: Name of a recipe, a strength or None for that of `RECIPES`, and the number of the run; None to try the strength.
Task: TypeAlias = tuple[str, float | None, int | None]


def compare(
    settings: Settings,
    recipes: Iterable[Recipe],
    folder: str | Path,
    *,
    jobs: int = 1,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Train under each recipe from each seed and return the records.

    `folder/records.jsonl` grows by one line for each epoch and each finished run; `folder/settings.json` holds the settings.
    Called again with the same settings, runs that are finished are not run again, unless the definition of their recipe has
    changed. With `settings.tuning` each recipe's strength is first chosen by noisy validation, and each trial leaves a line too.
    Where the model is a file, `folder/models/` gets one trained model for each recipe, from seed 0.

    A run that fails, for instance because its training diverges, leaves a record with "event" "failed" and the reason as
    "error"; the others go on, and a later call tries it again.

    In a script, call this under `if __name__ == "__main__":` where `jobs` is above 1, for processes import the script.

    Args:
        settings: what all runs share.
        recipes: the regularisers, from `RECIPES`.
        folder: where the files go; made if need be.
        jobs: processes that run at a time.
        on_record: called with each new record.

    Returns:
        The records of all runs in the folder, those of earlier calls first.

    Raises:
        ArgumentError: when the folder cannot be written, holds a comparison with other settings or is another's at the time, a
            recipe is not registered, the data cannot be read, or the model does not fit them.
        BackendError: when the backend, or a package that the data need, is not installed.
        MgsError: when worker processes end before their runs.

    Warns:
        UserWarning: when the folder holds runs that were made with other versions of this library or the backend's packages, or
            half of the columns of a table together have hardly any of its variance, for inputs are scaled as a whole.

    Example:
        >>> import tempfile
        >>> from mgs_core.experiments import RECIPES, Settings, compare
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     records = compare(Settings(samples=100, epochs=2, seeds=1), [RECIPES["none"]], folder)
        >>> [record["event"] for record in records]
        ['epoch', 'epoch', 'run']
    """
    chosen = list(recipes)
    strange = [recipe.name for recipe in chosen if RECIPES.get(recipe.name) != recipe]
    if strange:
        raise ArgumentError(f"`recipes` must be registered in RECIPES, where other processes find them; got {strange}.")
    jobs = integer("jobs", jobs, 1)
    get_backend(settings.backend)
    data = check_fit(settings, dropout=any(recipe.dropout for recipe in chosen))
    if not is_file(settings.model):  # which takes the samples as they are
        warn_of_units(data.train_inputs)
    out = Path(folder)
    with _open_folder(out, settings) as path, JSONLinesSink(path) as sink:
        for tasks in (_trials, _runs):
            waiting = tasks(chosen, settings, load_records(path))
            several = jobs > 1 and len(waiting) > 1
            for record in _in_processes(waiting, settings, out, jobs) if several else _here(waiting, settings, out):
                sink.write(record)
                on_record(record)
    return load_records(path)


def _trials(recipes: list[Recipe], settings: Settings, records: list[Record]) -> list[Task]:
    """Return the strengths that are still to be tried."""
    wanted: list[Task] = [(recipe.name, strength, None) for recipe in recipes for strength in strengths(recipe, settings.tuning)]
    done = {(record["regularizer"], record["strength"]): record for record in records if record["event"] == "tuning"}
    return [task for task in wanted if not _same(task, done.get(task[:2]))]


def _runs(recipes: list[Recipe], settings: Settings, records: list[Record]) -> list[Task]:
    """Return the runs that are still to be made, each with the strength that the trials chose."""
    done = {(record["regularizer"], record["seed"]): record for record in records if record["event"] == "run"}
    chosen = {
        recipe.name: best_strength(records, recipe.name) if strengths(recipe, settings.tuning) else None for recipe in recipes
    }
    wanted: list[Task] = [(recipe.name, chosen[recipe.name], seed) for seed in range(settings.seeds) for recipe in recipes]
    return [task for task in wanted if not _same(task, done.get(task[::2]))]


def _recipe(task: Task) -> Recipe:
    name, strength, _ = task
    return RECIPES[name] if strength is None else RECIPES[name].with_strength(strength)


def _same(task: Task, record: Record | None) -> bool:
    """Say whether a record is that of the task, made by the recipe as it is defined now; old records do not say by which."""
    return record is not None and record.get("recipe") in (None, definition(_recipe(task)))


def _perform(task: Task, settings: Settings, folder: Path) -> Iterator[Record]:
    """Yield the records of a task; one that fails ends with a record that says why, for the others must go on."""
    name, strength, seed = task
    made = {"recipe": definition(_recipe(task)), "versions": versions(settings.backend)}
    try:
        if seed is None:
            yield {**try_strength(name, cast(float, strength), settings), **made}
        else:
            for record in train(_recipe(task), seed, settings, folder=folder):
                yield record if record["event"] == "epoch" else {**record, **made}
    except Exception as error:
        yield {
            "event": "failed",
            "of": "tuning" if seed is None else "run",
            "regularizer": name,
            "seed": TRIAL_SEED if seed is None else seed,
            "strength": strength,
            "error": str(error) if isinstance(error, MgsError) else f"{type(error).__name__}: {error}",
            **made,
        }


def best_model(records: Iterable[Record], folder: Path) -> Path | None:
    """Return the trained model of the recipe whose last test accuracy is best, the mean over its runs.

    Args:
        records: of a comparison of the user's own model.
        folder: where `compare` wrote them.

    Returns:
        The file; None where the comparison wrote no models.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        if record["event"] == "run":
            found.setdefault(record["regularizer"], []).append(record["last_test_accuracy"])
    paths = {folder / "models" / f"{name}.onnx": sum(values) / len(values) for name, values in found.items()}
    written = {path: value for path, value in paths.items() if path.is_file()}
    return max(written, key=written.__getitem__, default=None)


def load_records(path: Path) -> list[Record]:
    """Return the records of a comparison, those of runs that were interrupted too.

    A line that an interruption cut short is passed over. Of a run that was begun twice the later lines count: a failed run that
    has since been finished is not listed as failed.

    Args:
        path: a file of JSON lines, which need not exist.

    Returns:
        The records in order.

    Raises:
        ArgumentError: when a line holds something else than a record.
    """
    if not path.exists():
        return []
    kept: dict[tuple[Any, ...], Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not {"event", "regularizer", "seed"} <= record.keys():
            raise ArgumentError(
                f"`path` must hold records of a comparison; line {number} of {str(path)!r} is none. Choose another folder."
            )
        kind = record.get("of", record["event"])
        strength = record.get("strength") if kind == "tuning" else None
        kept[record["regularizer"], record["seed"], kind, record.get("epoch"), strength] = record
    return list(kept.values())


def load_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the comparison in a folder.

    Args:
        folder: a folder that `compare` wrote.

    Returns:
        What `Settings.to_dict` gave.

    Raises:
        ArgumentError: when the folder holds none.
    """
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"`folder` must be one that mgs compare wrote; got {str(folder)!r} ({error}).") from error
    if not isinstance(settings, dict):
        raise ArgumentError(f"`folder` must be one that mgs compare wrote; the settings in {str(folder)!r} are no object.")
    return settings


@contextmanager
def _open_folder(folder: Path, settings: Settings) -> Iterator[Path]:
    """Write the settings, and give the path of the records, made to end with a line's end; no other comparison may meanwhile."""
    path, records = folder / "settings.json", folder / "records.jsonl"
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(records.open("a+b"))
            _hold(file, folder)
            written = settings.to_dict()
            if path.exists() and (found := load_records(records)):  # else it failed before it began, perhaps for these settings
                before = load_settings(folder)
                written["seeds"] = max(settings.seeds, before.get("seeds", 0))  # more or fewer may be asked for later
                _refuse_other(folder, before, written)
                _warn_of_versions(folder, found, settings.backend)
            path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
                file.flush()
        yield records


def _hold(file: BinaryIO, folder: Path) -> None:
    """Lock the records until they are closed, where the system has such locks."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ArgumentError(
            f"`folder` must be a folder that no other comparison writes at the time; got {str(folder)!r}. "
            "Wait until it has ended, or choose another."
        ) from error
    except OSError:  # a file system without locks
        return


def _refuse_other(folder: Path, before: Record, now: Record) -> None:
    changed = {name: value for name, value in now.items() if name != "seeds" and before.get(name) != value}
    if changed:
        old = {name: before.get(name) for name in changed}
        raise ArgumentError(f"`folder` must be a new one for other settings; {folder} was begun with {old}, now {changed}.")


def _warn_of_versions(folder: Path, records: list[Record], backend: str) -> None:
    others = other_versions(records, backend)
    if others:
        listed = ", ".join(f"{name} {' and '.join(old)}" for name, old in others.items())
        warnings.warn(
            f"{folder} holds runs that were made with {listed}, and now {versions(backend)} is installed. "
            "They are kept; take a new folder to compare within one version.",
            stacklevel=5,
        )


def _here(tasks: list[Task], settings: Settings, folder: Path) -> Iterator[Record]:
    for task in tasks:
        yield from _perform(task, settings, folder)


def _in_processes(tasks: list[Task], settings: Settings, folder: Path, jobs: int) -> Iterator[Record]:
    """Yield the records of all tasks as they come from worker processes; leaving the iterator ends them."""
    context = multiprocessing.get_context("spawn")  # fork would copy threads' locks
    records: Any = context.Queue()
    waiting: Any = context.Queue()
    for task in tasks:
        waiting.put(task)
    threads = {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
    os.environ.update(dict.fromkeys(threads, "1"))  # one core a process; read when the child loads its libraries
    workers = []
    try:
        for _ in range(min(jobs, len(tasks))):
            worker = context.Process(target=_work, args=(waiting, records, settings, folder), daemon=True)
            worker.start()  # fails in a process that is itself being started, where a script calls `compare` unguarded
            workers.append(worker)
        finished = 0
        while finished < len(tasks):
            try:
                record = records.get(timeout=1.0)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    raise MgsError(
                        "The worker processes ended before their runs did. In a script, call `compare` under `if __name__ == "
                        '"__main__":`, for processes import the script. Elsewhere run again with `jobs` 1 to see why.'
                    ) from None
                continue
            finished += record["event"] != "epoch"
            yield record
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
        for name, value in threads.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _work(waiting: Any, records: Any, settings: Settings, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    parent = multiprocessing.parent_process()
    while True:
        try:
            task = waiting.get(timeout=1.0)
        except queue.Empty:
            return
        for record in _perform(task, settings, folder):
            if parent is not None and not parent.is_alive():  # it was killed, and nobody else takes the records
                return
            records.put(record)
