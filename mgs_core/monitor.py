"""Record summaries of the kernel of a probe batch during training: when, what, and where to."""

from __future__ import annotations

import importlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from mgs_core._arguments import integer
from mgs_core._errors import ArgumentError, BackendError, NotFiniteError
from mgs_core._matrix import as_numpy
from mgs_core._types import Array
from mgs_core.kernel import check_options, kernel
from mgs_core.summary import Summary, summarize, undefined


@dataclass(frozen=True)
class Schedule:
    """Say at which steps to measure: `start`, `start + every`, … up to and including `stop`.

    Attributes:
        every: steps (or epochs, as the caller counts) between measurements, at least 1.
        start: first step to measure.
        stop: last step that may be measured; None for no end.

    Raises:
        ArgumentError: when an argument is no integer or out of range.

    Example:
        >>> import mgs_core as mgs
        >>> [step for step in range(10) if mgs.Schedule(every=3, start=1)(step)]
        [1, 4, 7]
    """

    every: int = 1
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("every", self.every, 1), ("start", self.start, 0), ("stop", self.stop, 0)):
            if name != "stop" or value is not None:
                object.__setattr__(self, name, integer(name, value, least))  # the class is frozen

    def __call__(self, step: int) -> bool:
        """Return whether to measure at this step."""
        return step >= self.start and (self.stop is None or step <= self.stop) and (step - self.start) % self.every == 0


@runtime_checkable
class Sink(Protocol):
    """Take records; anything with these two methods is a sink."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record: "step", and numbers by name."""
        ...

    def close(self) -> None:
        """Write out what is held and let go of the resource."""
        ...


class Summarizer:
    """Summarise kernels of a model that is trained; when it diverges or dies, warn once and let it go on."""

    def __init__(self, labels: Any = None) -> None:
        """Hold the labels, integers (n,) or None."""
        self._labels, self._warned = labels, False

    def __call__(self, measure: Callable[[], Array]) -> Summary:
        """Return the summary of the kernel that `measure` returns; NaN for what is not finite, and where all gradients are 0."""
        matrix = None
        try:
            matrix = measure()
            return summarize(matrix, self._labels)
        except NotFiniteError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"The kernel of the probe batch has no summary, NaN is recorded: {error}", RuntimeWarning, 3)
            return undefined(matrix, labelled=self._labels is not None)


def targets_of(targets: Any, labels: Any, options: Mapping[str, Any], *, usual_loss: bool = True) -> Any:
    """Return the targets of a probe batch; where none are given for a head that takes labels, those.

    Args:
        targets: what the user gave as targets, or None.
        labels: what was given for the class-wise summaries, or None.
        options: those of the kernel.
        usual_loss: whether a loss that is not named is the cross-entropy, which takes labels.
    """
    takes_labels = options.get("output") == "target" or (
        options.get("output") == "loss" and options.get("loss") is None and usual_loss
    )
    if targets is not None or labels is None or not takes_labels or as_numpy(labels).dtype.kind not in "iu":
        return targets
    return labels if hasattr(labels, "shape") else as_numpy(labels)


class Recorder:
    """Measure the kernel of one probe batch on schedule, keep the history and pass it on.

    A model that diverges does not end the training: its figures are recorded as NaN, with one warning.

    Attributes:
        history: the records so far: dicts with "step", "seconds" (what the measurement took) and the summary's fields, prefixed.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> model = mgs.FunctionalModel(lambda p, x: x @ p["weight"], {"weight": np.zeros((2, 1))})
        >>> recorder = mgs.Recorder(np.array([[1.0, 0.0], [0.0, 1.0]]), schedule=2)
        >>> for step in range(4):
        ...     summary = recorder(model, step)
        >>> [(record["step"], record["mgs_trace"]) for record in recorder.history]
        [(0, 2.0), (2, 2.0)]
    """

    def __init__(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        labels: Any = None,
        schedule: Schedule | int = 1,
        sinks: Iterable[Sink] = (),
        prefix: str = "mgs_",
        **kernel_options: Any,
    ) -> None:
        """Hold the probe batch and the schedule.

        Args:
            inputs: probe batch, as for `kernel`; 64 to 256 samples are usual.
            targets: its targets; where there are none, the labels are, for "target" and the usual loss.
            labels: integers (n,) for the class-wise summaries.
            schedule: a `Schedule`, or the number of steps between measurements.
            sinks: where records go besides `history`.
            prefix: put before the names of the summary's fields.
            **kernel_options: passed to `kernel`: `output`, `transform`, `parameters`, …

        Raises:
            ArgumentError: when an option is unknown or does not fit.
        """
        self.history: list[dict[str, Any]] = []
        targets = targets_of(targets, labels, kernel_options)
        self._batch = (inputs, targets)
        self._summarize = Summarizer(labels)
        self._schedule = schedule if isinstance(schedule, Schedule) else Schedule(schedule)
        several = isinstance(sinks, Iterable) and not isinstance(sinks, Sink)
        self._sinks = tuple(sinks) if several else ()
        if not several or not all(isinstance(sink, Sink) for sink in self._sinks):
            raise ArgumentError(
                f"`sinks` must be a list of objects with `write` and `close`; got {sinks!r}. "
                "For example [mgs_core.JSONLinesSink(path)]."
            )
        self._prefix = prefix
        self._options = check_options(kernel_options, targets)

    def __call__(self, model: Any, step: int, **extra: Any) -> Summary | None:
        """Measure if the schedule says so.

        Args:
            model: as for `kernel`.
            step: number of the step or epoch.
            **extra: further entries of the record, for instance the loss.

        Returns:
            The summary, or None when the step is not on the schedule.
        """
        if not self._schedule(step):
            return None
        start = time.perf_counter()
        summary = self._summarize(lambda: kernel(model, *self._batch, **self._options))
        record: dict[str, Any] = {"step": step, "seconds": time.perf_counter() - start, **extra}
        record.update({self._prefix + name: value for name, value in summary.to_dict().items()})
        self.history.append(record)
        for sink in self._sinks:
            sink.write(record)
        return summary


class JSONLinesSink:
    r"""Append records to a file, one JSON object a line, each flushed at once.

    Example:
        >>> import pathlib, tempfile
        >>> import mgs_core as mgs
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "run.jsonl"
        ...     with mgs.JSONLinesSink(path) as sink:
        ...         sink.write({"step": 0, "mgs_trace": 2.0})
        ...     path.read_text()
        '{"step": 0, "mgs_trace": 2.0}\n'
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file.

        Args:
            path: the file; made if it does not exist, appended to if it does.

        Raises:
            ArgumentError: when it cannot be opened for writing.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115  # held open until close()
        except OSError as error:
            raise ArgumentError(
                f"`path` must be a file that can be written; got {str(path)!r} ({error}). Choose another."
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; a number that is none, as the loss of a model that has diverged, is written as null."""
        self._file.write(json.dumps({name: _finite(value) for name, value in record.items()}, default=_plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> JSONLinesSink:
        """Return the sink."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file."""
        self.close()


class CallbackSink:
    """Pass the numbers of each record to a tracker's own logging function.

    Example:
        >>> import mgs_core as mgs
        >>> mgs.CallbackSink(lambda numbers, step: print(step, numbers)).write({"step": 3, "mgs_trace": 2.0})
        3 {'mgs_trace': 2.0}
    """

    def __init__(self, log: Callable[[dict[str, float], int], Any], close: Callable[[], Any] | None = None) -> None:
        """Hold the functions.

        Args:
            log: `(numbers by name, step)`.
            close: called at the end, or None.
        """
        self._log = log
        self._close = close

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass one record on."""
        values = {name: _plain(value) for name, value in record.items() if name != "step"}
        self._log({name: float(value) for name, value in values.items() if isinstance(value, (int, float))}, int(record["step"]))

    def close(self) -> None:
        """Call the tracker's own end."""
        if self._close is not None:
            self._close()


def _plain(value: Any) -> Any:
    """Return an array of one number, as a loss may be, as a number of Python; anything else that is no number as text."""
    if value is None or isinstance(value, (int, float, str)):
        return value
    if math.prod(getattr(value, "shape", (0,))) != 1:
        return str(value)
    return value.item() if hasattr(value, "item") else float(value)  # TensorFlow's have none


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    number = _plain(value)
    return None if isinstance(number, float) and not math.isfinite(number) else number


def tracker_sink(name: str, **options: Any) -> CallbackSink:
    """Return a sink for an experiment tracker, imported only now.

    Args:
        name: "tensorboard" (a `SummaryWriter` of torch or tensorboardX), "wandb" or "mlflow" (into the active run).
        **options: for TensorBoard only, passed to `SummaryWriter`, for instance `log_dir`.

    Returns:
        The sink.

    Raises:
        ArgumentError: when the name is unknown, or has no options.
        BackendError: when the tracker is not installed.

    Example:
        >>> import mgs_core as mgs
        >>> mgs.tracker_sink("paper")
        Traceback (most recent call last):
        mgs_core._errors.ArgumentError: `name` must be one of tensorboard, wandb, mlflow; got 'paper'.
    """
    if options and name in ("wandb", "mlflow"):
        raise ArgumentError(
            f"`options` must be empty for {name!r}; got {', '.join(options)}. Give them to the run that you begin."
        )
    if name == "tensorboard":
        writer = _import("tensorboardX", "torch.utils.tensorboard").SummaryWriter(**options)

        def log(numbers: dict[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return CallbackSink(log, writer.close)
    if name == "wandb":
        wandb = _import("wandb")
        return CallbackSink(lambda numbers, step: wandb.log(numbers, step=step))
    if name == "mlflow":
        mlflow = _import("mlflow")
        return CallbackSink(lambda numbers, step: mlflow.log_metrics(numbers, step=step))
    raise ArgumentError(f"`name` must be one of tensorboard, wandb, mlflow; got {name!r}.")


def _import(*names: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise BackendError(f"`name` must be a tracker that is installed; none of {', '.join(names)} is. Install it with pip.")
