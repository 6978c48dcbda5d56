"""The functional abstraction of a model: a pure function and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mgs_core._errors import ArgumentError
from mgs_core._types import Array, Tree


@dataclass(frozen=True, eq=False)
class FunctionalModel:
    """Hold a pure function `f(θ, x)` together with its parameters θ.

    Attributes:
        function: `function(parameters, inputs) → (n, c)`; must treat each sample by itself and change neither argument.
        parameters: dict, list or tuple, nested at will, with arrays as leaves.

    Raises:
        ArgumentError: when `function` cannot be called.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> model = mgs.FunctionalModel(lambda p, x: x @ p["w"] + p["b"], {"w": np.ones((3, 2)), "b": np.zeros(2)})
        >>> model(np.ones((4, 3))).shape
        (4, 2)
    """

    function: Callable[[Tree, Any], Array]
    parameters: Tree

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ArgumentError(
                f"`function` must be callable as function(parameters, inputs); got {type(self.function).__name__}. "
                "Pass the function first and the parameters second."
            )

    def __call__(self, inputs: Any) -> Array:
        """Return the outputs `f(θ, x)`, shape (n, c)."""
        return self.function(self.parameters, inputs)
