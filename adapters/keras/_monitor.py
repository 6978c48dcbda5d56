"""Watch the kernel of a probe batch during `fit`, and change the strength of the penalty."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import mgs_core as mgs
from mgs_core.kernel import check_options
from mgs_core.monitor import Summarizer, targets_of

from ._keras import keras
from ._losses import sample_loss


def _takes_compiled_loss(model: Any, options: Mapping[str, Any]) -> bool:
    """Say whether the kernel is of the losses, and they are those that the model was compiled with."""
    unnamed = options.get("loss") is None and options.get("transform", "identity") == "identity"
    return options.get("output") == "loss" and unnamed and model._compile_loss is not None


class MGSMonitor(keras.callbacks.Callback):  # type: ignore[misc]  # keras has no types
    """Put the summaries of the probe batch's kernel into the logs: mgs_trace, mgs_log_determinant and so on.

    It moves itself to the front of the callbacks, so that `EarlyStopping`, `ModelCheckpoint`, `CSVLogger` and `TensorBoard` see
    its figures wherever it stands in the list. Between two measurements the last figures stay in the logs.

    Attributes:
        history: the records so far: dicts with "epoch" or "batch", and the figures.

    Example:
        >>> import keras
        >>> from mgs_core.adapters.keras import MGSMonitor
        >>> model = keras.Sequential([keras.layers.Dense(2)])
        >>> model.compile("sgd", "mse")
        >>> x, y = keras.ops.ones((8, 3)), keras.ops.ones((8, 2))
        >>> history = model.fit(x, y, verbose=0, callbacks=[MGSMonitor(x[:4])])
        >>> "mgs_trace" in history.history
        True
    """

    def __init__(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        labels: Any = None,
        every: int | mgs.Schedule = 1,
        batches: int | mgs.Schedule | None = None,
        sinks: Iterable[Any] = (),
        prefix: str = "mgs_",
        **kernel_options: Any,
    ) -> None:
        """Hold the probe batch.

        Args:
            inputs: probe batch, as the model takes it; 64 to 256 samples are usual.
            targets: its targets; `output="target"` takes the labels where there are none.
            labels: integers (n,) for the class-wise summaries.
            every: epochs between measurements, or a `Schedule`; the first epoch is measured whatever it says, so that the logs
                have all columns from the start.
            batches: also measure every so many batches, into `history` and the sinks; None for epochs only.
            sinks: where records go besides `history`, see `mgs_core.Recorder`.
            prefix: put before the names of the figures.
            **kernel_options: passed to `mgs_core.kernel`: `output`, `transform`, …; `output="loss"` takes the losses that the
                model is compiled with, unless there is a `loss`.

        Raises:
            ArgumentError: when an option is unknown or does not fit.
        """
        super().__init__()
        self.history: list[dict[str, Any]] = []
        targets = targets_of(targets, labels, kernel_options, usual_loss=False)
        self._inputs, self._targets, self._summarize = inputs, targets, Summarizer(labels)
        self._every = _schedule(every)
        self._batches = None if batches is None else _schedule(batches)
        self._sinks, self._prefix, self._options = tuple(sinks), prefix, check_options(kernel_options, targets)
        self._kernel: Any = None
        self._probe: Any = None
        self._last: dict[str, float] = {}
        self._batch = 0
        if self._batches is not None:  # only then, for Keras calls back less often where no callback wants batches
            self.on_train_batch_end = self._after_batch

    def set_model(self, model: Any) -> None:
        """Take the model, and the first place among the callbacks."""
        super().set_model(model)
        # a callback is not told its list; the caller is that list
        frame = inspect.currentframe()
        while frame is not None:
            container = frame.f_locals.get("self")
            if isinstance(container, keras.callbacks.CallbackList) and self in container.callbacks:
                container.callbacks.remove(self)
                container.callbacks.insert(0, self)
                return
            frame = frame.f_back

    def on_train_begin(self, logs: Any = None) -> None:
        """Compile the measurement anew, for layers may have been frozen since."""
        backend: Any = mgs.get_backend(self.model)
        model, options = self.model, self._options

        def measure(trainable: Any, fixed: Any, inputs: Any, targets: Any) -> Any:
            own = {"loss": sample_loss(model)} if _takes_compiled_loss(model, options) else {}
            return mgs.kernel(backend.functional(model, trainable, fixed), inputs, targets, **{**options, **own})

        self._kernel, self._batch, self._last = backend.compile(measure), 0, {}
        self._probe = (
            keras.tree.map_structure(backend.asarray, self._inputs),
            (None if self._targets is None else keras.tree.map_structure(backend.asarray, self._targets)),
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measure on schedule, and put the last figures into the logs."""
        if self._every(epoch) or not self._last:
            self._last = self._measure("epoch", epoch)
        if logs is not None:
            logs.update(self._last)

    def on_train_end(self, logs: Any = None) -> None:
        """Let go of what was compiled."""
        self._kernel = self._probe = None

    def _after_batch(self, batch: int, logs: Any = None) -> None:
        if self._batches is not None and self._batches(self._batch):
            self._measure("batch", self._batch)
        self._batch += 1

    def _measure(self, unit: Literal["epoch", "batch"], number: int) -> dict[str, float]:
        model = self.model  # on JAX this brings the variables up to date
        backend: Any = mgs.get_backend(model)
        state = backend.values(model.trainable_variables), backend.values(model.non_trainable_variables)
        summary = self._summarize(lambda: self._kernel(*state, *self._probe))
        figures = {self._prefix + name: value for name, value in summary.to_dict().items()}
        self.history.append({unit: number, **figures})
        for sink in self._sinks:
            sink.write({"step": number, "unit": unit, **figures})
        return figures


def _schedule(every: int | mgs.Schedule) -> mgs.Schedule:
    return every if isinstance(every, mgs.Schedule) else mgs.Schedule(every)


class StrengthSchedule(keras.callbacks.Callback):  # type: ignore[misc]
    """Set the strength of the penalty before each epoch or batch, without compiling the step again.

    Example:
        >>> from mgs_core.adapters.keras import StrengthSchedule
        >>> warm_up = StrengthSchedule(lambda epoch: min(1.0, epoch / 10) * 0.1)
    """

    def __init__(self, schedule: Callable[[int], float], *, by: Literal["epoch", "batch"] = "epoch") -> None:
        """Hold the schedule.

        Args:
            schedule: number of the epoch, or of the batch since `fit` began, to strength.
            by: "epoch" or "batch".

        Raises:
            ArgumentError: when `by` is neither.
        """
        super().__init__()
        self._schedule = schedule
        self._batch = 0
        if by == "epoch":
            self.on_epoch_begin = self._before
        elif by == "batch":
            self.on_train_batch_begin = self._before_batch
        else:
            raise mgs.ArgumentError(f'`by` must be "epoch" or "batch"; got {by!r}.')

    def on_train_begin(self, logs: Any = None) -> None:
        """Count batches anew, and refuse a model without a regulariser."""
        if getattr(self.model, "_mgs", None) is None:
            raise mgs.ArgumentError(
                "`model` must have a regularizer for its strength to be scheduled; got none. Call regularize first."
            )
        self._batch = 0

    def _before(self, number: int, logs: Any = None) -> None:
        self.model._mgs.set_strength(float(self._schedule(number)))

    def _before_batch(self, batch: int, logs: Any = None) -> None:
        self._before(self._batch)
        self._batch += 1
