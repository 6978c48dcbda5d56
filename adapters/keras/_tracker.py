"""The metric that the logs show, and what else of a regulariser must not be compiled into the step."""

from __future__ import annotations

from typing import Any

from ._keras import keras

NAME = "mgs_penalty"


class Tracker(keras.metrics.Metric):  # type: ignore[misc]  # keras has no types
    """Average the penalty over an epoch, and hold what must not be compiled into the step as a constant.

    Attributes:
        strength: factor of the penalty.
        step: number of steps taken.
        seeds: of random probes; None where there are none.
    """

    def __init__(self, strength: float, seed: int | None) -> None:
        super().__init__(name=NAME)
        self.total = self.add_variable((), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")
        self.strength = self.add_variable((), keras.initializers.Constant(strength), name="strength")
        self.step = self.add_variable((), "zeros", dtype="int32", name="step")
        self.seeds = None if seed is None else keras.random.SeedGenerator(seed)
        self.drawn = None if self.seeds is None else self.seeds.state  # by which Keras counts it among the variables

    def update_state(self, *targets_and_outputs: Any, **keywords: Any) -> None:
        """Do nothing: a `train_step` of the user's gives all metrics targets and outputs, of which this one is none."""

    def track(self, value: Any, due: Any = 1.0) -> None:
        """Add one step's penalty; 0 for `due` leaves it out."""
        weight = keras.ops.cast(due, self.total.dtype)
        self.total.assign_add(weight * keras.ops.cast(value, self.total.dtype))
        self.count.assign_add(weight)

    @property
    def at_hand(self) -> bool:
        """Return whether the variables have values; on JAX those of a trained model have some within a scope only."""
        try:
            return self.strength.value is not None
        except TypeError:  # of the initialiser, which is gone
            return False

    def result(self) -> Any:
        """Return the mean."""
        return self.total / keras.ops.maximum(self.count, 1.0)

    def reset_state(self) -> None:
        """Begin a new mean."""
        self.total.assign(0.0)
        self.count.assign(0.0)
