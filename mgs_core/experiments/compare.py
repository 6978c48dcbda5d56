"""Run every recipe from every seed, in parallel and resumable, writing each record as it comes."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from mgs_core._errors import ArgumentError, MgsError
from mgs_core.experiments.recipes import RECIPES, Recipe
from mgs_core.experiments.settings import Settings
from mgs_core.experiments.training import train
from mgs_core.monitor import JSONLinesSink

Record: TypeAlias = dict[str, Any]
Task: TypeAlias = tuple[str, int]


def compare(
    settings: Settings,
    recipes: Iterable[Recipe],
    folder: str | Path,
    *,
    jobs: int = 1,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Train under each recipe from each seed and return the records of all finished runs.

    `folder/records.jsonl` grows by one line for each epoch and each finished run; `folder/settings.json` holds the settings. Called
    again with the same settings, runs that are finished are not run again.

    Args:
        settings: what all runs share.
        recipes: the regularisers, from `RECIPES`.
        folder: where the files go; made if need be.
        jobs: processes that run at a time.
        on_record: called with each new record.

    Returns:
        The records, those of earlier calls first.

    Raises:
        ArgumentError: when the folder cannot be written or holds a comparison with other settings, or a recipe is not registered.

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
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ArgumentError(f"`jobs` must be an integer of at least 1; got {jobs!r}.")
    path = _open_folder(Path(folder), settings)
    records = load_records(path)
    done = {(record["regularizer"], record["seed"]) for record in records if record["event"] == "run"}
    tasks = [(recipe.name, seed) for seed in range(settings.seeds) for recipe in chosen if (recipe.name, seed) not in done]
    fresh = _in_processes(tasks, settings, jobs) if jobs > 1 and len(tasks) > 1 else _here(tasks, settings)
    with JSONLinesSink(path) as sink:
        for record in fresh:
            sink.write(record)
            records.append(record)
            on_record(record)
    return records


def load_records(path: Path) -> list[Record]:
    """Return the records of finished runs; a line that an interruption cut short is passed over.

    Args:
        path: a file of JSON lines, which need not exist.

    Returns:
        The records in order.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    finished = {(record["regularizer"], record["seed"]) for record in records if record["event"] == "run"}
    kept: dict[tuple[Any, ...], Record] = {}
    for record in records:
        run = (record["regularizer"], record["seed"])
        if run in finished:
            kept[(*run, record["event"], record.get("epoch"))] = record  # of a run that was begun twice the later lines count
    return list(kept.values())


def _open_folder(folder: Path, settings: Settings) -> Path:
    path = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = {name: value for name, value in settings.to_dict().items() if name != "seeds" and before.get(name) != value}
            if changed:
                old = {name: before.get(name) for name in changed}
                raise ArgumentError(f"`out` must be a new folder for other settings; {folder} was begun with {old}, now {changed}.")
        path.write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")
    except (OSError, json.JSONDecodeError) as error:
        raise ArgumentError(f"`out` must be a folder that can be written; got {str(folder)!r} ({error}). Choose another.") from error
    return folder / "records.jsonl"


def _here(tasks: list[Task], settings: Settings) -> Iterator[Record]:
    for name, seed in tasks:
        yield from train(RECIPES[name], seed, settings)


def _in_processes(tasks: list[Task], settings: Settings, jobs: int) -> Iterator[Record]:
    """Yield the records of all tasks as they come from worker processes; leaving the iterator ends them."""
    context = multiprocessing.get_context("spawn")  # fork would copy threads' locks
    records: Any = context.Queue()
    waiting: Any = context.Queue()
    for task in tasks:
        waiting.put(task)
    threads = {name: os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
    os.environ.update(dict.fromkeys(threads, "1"))  # one core a process; read when the child loads its libraries
    workers = [context.Process(target=_work, args=(waiting, records, settings), daemon=True) for _ in range(min(jobs, len(tasks)))]
    try:
        for worker in workers:
            worker.start()
        finished = 0
        while finished < len(tasks):
            try:
                record = records.get(timeout=1.0)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    raise MgsError("The worker processes ended before their runs did. Run again with `jobs` 1 to see why.") from None
                continue
            if isinstance(record, MgsError):
                raise record
            finished += record["event"] == "run"
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


def _work(waiting: Any, records: Any, settings: Settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    while True:
        try:
            name, seed = waiting.get(timeout=1.0)
        except queue.Empty:
            return
        try:
            for record in train(RECIPES[name], seed, settings):
                records.put(record)
        except MgsError as error:
            records.put(error)
            return
        except Exception as error:  # tell the parent of anything else too
            records.put(MgsError(f"The run of {name!r} from seed {seed} failed: {type(error).__name__}: {error}"))
            return
