"""What a backend supplies, and what it hands to the mathematics.

A backend is an object with the methods of `Backend`. Its namespace may have functions of its own besides the array API. Each
stands in for one place of the core, which says what it returns, and whether None for what it does not do better:

* `mgs_contribution(left, right, full)`, `mgs_product(left, right)`, and the flag `mgs_counts_biases`: see `contraction.py`;
* `mgs_weighted_gradient(use, weights)`, `mgs_sum_by_index(values, indices, size)`: see `gradient.py`;
* `mgs_log_determinant(kernel, eps)`, `mgs_constant(array)`: see `penalty.py`;
* `mgs_picked(outputs, labels)`, `mgs_labels(labels, c)`, `mgs_shares(targets)`, `mgs_values(array)`: see `heads.py`;
* `mgs_beside(array)`: where arrays are made, see `_namespace.py`;
* the operators of ONNX: see `onnx/extensions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from mgs_core._types import Array, Namespace, Tree

#: Map rows of a use, (n, k, size of the use), to rows of the parameter, (n, k, p); None when they are the same.
Restore: TypeAlias = Callable[[Array], Array] | None


@dataclass(frozen=True, eq=False)
class _Use:
    """One way in which one parameter is used.

    Attributes:
        parameter: the parameter's name.
        gradients: gradient of each head at the output of the use, samples first, then heads.
        view: what lies between the parameter and its use (transposes, reshapes); uses with equal views share coordinates.
        restore: maps rows in the coordinates of the use to those of the parameter.
        part: number of the part of the parameter that is used; parts share no element, so they have no cross terms. None when
            the uses of the parameter are not all divided into the same parts.
        origin: uses of equal origin have the same gradients but for their shape, as a weight and its bias; None when unknown.
    """

    parameter: str
    gradients: Array
    view: tuple[Any, ...] = ()
    restore: Restore = None
    part: int | None = None
    origin: Any = None


@dataclass(frozen=True, eq=False)
class Outer(_Use):
    """A weight used as `y = a W`: gradients (n, k, g, s, o), inputs (n, g, s, i); the use is (g, i, o).

    Attributes:
        inputs: a.
        one: count the bias in, as the weight of one more input, which is always 1; see `contract`.
    """

    inputs: Array = None
    one: bool = False


@dataclass(frozen=True, eq=False)
class Convolution(_Use):
    """A convolution's weight: an `Outer` over output positions whose inputs are patches that need not be cut out beforehand.

    Gradients (n, k, s, g, o, *out), images (n, s, g, i, *space); the use is (g, i·window, o).

    Attributes:
        images: the layer's input, not padded; s images for each sample, usually one.
        window: sizes of the kernel.
        strides: steps of the window.
        pads: zeros before and after each axis of space.
        dilations: distances between the window's elements.
    """

    images: Array = None
    window: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    dilations: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Sum(_Use):
    """A weight that is added: gradients (n, k, s, o); the use is (o,)."""


@dataclass(frozen=True, eq=False)
class Scale(_Use):
    """A weight that multiplies elementwise: gradients (n, k, s, o), inputs (n, s, o); the use is (o,)."""

    inputs: Array = None


@dataclass(frozen=True, eq=False)
class Lookup(_Use):
    """A table whose rows are looked up: gradients (n, k, s, o), indices (n, s) of integers; the use is (size, o)."""

    indices: Array = None
    size: int = 0


@dataclass(frozen=True, eq=False)
class Rows(_Use):
    """Explicit per-sample gradients: gradients (n, k, p)."""


LayerStatistics: TypeAlias = Outer | Convolution | Sum | Scale | Lookup | Rows

#: `(outputs (n, c), targets) → (n, k)`: the scalars whose gradients make the kernel.
HeadFunction: TypeAlias = Callable[[Array, Any], Array]
#: None for all trainable parameters, names, or a predicate on names.
ParameterChoice: TypeAlias = str | Iterable[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class LayerReport:
    """Say how one parameter enters the kernel.

    Attributes:
        parameter: its name.
        kind: how it is used: outer, convolution, sum, scale, lookup or rows; several joined by "+"; "unused" where it does not
            move the outputs, "unknown" where it is refused.
        route: "statistics", "rows" or "refused".
        size: its number of elements.
        remedy: what to do when it, or a penalty on it, is refused, or when it is slow; empty otherwise.
        cost: estimate of the operations that its part of the kernel takes, beside the backward passes.
    """

    parameter: str
    kind: str
    route: str
    size: int
    remedy: str = ""
    cost: int = 0


@runtime_checkable
class Backend(Protocol):
    """Supply gradients in one framework, on its own devices and dtypes.

    A backend may have `summed_kernel(model, inputs, targets, head, parameters)` too: the kernel summed over the heads, (n, n),
    with less memory than the statistics of all heads take together. And `refuse_probabilities(model)`, which refuses a model
    whose outputs are seen to be no logits, before the cross-entropy is taken of them.
    """

    name: str
    namespace: Namespace

    def asarray(self, value: Any) -> Array:
        """Return the value as an array of this framework."""
        ...

    def to_numpy(self, array: Array) -> Any:
        """Return the array as a NumPy array on the host."""
        ...

    def parameters(self, model: Any) -> dict[str, Array]:
        """Return the trainable parameters by name."""
        ...

    def statistics(
        self, model: Any, inputs: Any, targets: Any, head: HeadFunction, parameters: ParameterChoice, *, differentiable: bool
    ) -> list[LayerStatistics]:
        """Return statistics that together cover every chosen parameter exactly once per use, or raise."""
        ...

    def value_and_gradient(self, function: Callable[..., Array]) -> Callable[..., tuple[Array, Tree]]:
        """Return a function that gives the scalar value and the gradient in the first argument; it can be nested."""
        ...

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function compiled for repeated calls, or the function itself."""
        ...
