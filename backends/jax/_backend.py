"""The backend's face: layer statistics and gradients of pure functions on JAX arrays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgs_core._errors import ArgumentError, UnsupportedModelError
from mgs_core._layout import refuse_infinite
from mgs_core._namespace import register_namespace
from mgs_core._protocol import HeadFunction, LayerStatistics, ParameterChoice, Rows
from mgs_core._tree import select
from mgs_core._types import Array, Namespace, Tree
from mgs_core.functional import FunctionalModel

from .fingerprint import fingerprint
from .interaction import refuse_interaction
from .models import functional, leaves_of, named, noting, pure, scalars
from .namespace import JaxNamespace, known
from .program import program_for
from .squeeze import squeezed
from .versions import ClosedJaxpr, has_values

_namespace = JaxNamespace()
register_namespace(lambda array: isinstance(array, jax.Array), _namespace)

if version("jaxlib") == "0.10.2" and "ynn_fusion_type" not in os.environ.get("XLA_FLAGS", ""):
    warnings.warn(
        "jaxlib 0.10.2 computes some sums wrongly on CPU, by tens of per cent, in kernels and in your own compiled functions "
        "(jax-ml/jax#39103). Install jax and jaxlib 0.10.1, or set XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce.",
        RuntimeWarning,
        stacklevel=2,
    )


class JaxBackend:
    """Implement `Backend` on JAX."""

    name = "jax"
    namespace: Namespace = _namespace

    def asarray(self, value: Any) -> Array:
        """Return the value as a JAX array; a traced array stays traced."""
        return jnp.asarray(value)

    def to_numpy(self, array: Array) -> Any:
        """Return the array as a NumPy array on the host."""
        if not has_values(array):
            raise ArgumentError(
                "`array` must have values in this process; got one that is traced, or of which other processes hold a part. "
                "Return it from the function that is compiled, or replicate it."
            )
        return np.asarray(array)

    def parameters(self, model: Any) -> dict[str, Array]:
        """Return the parameters by name."""
        return named(functional(model).parameters)

    def statistics(
        self, model: Any, inputs: Any, targets: Any, head: HeadFunction, parameters: ParameterChoice, *, differentiable: bool
    ) -> list[LayerStatistics]:
        """Return the layer statistics, as `Backend.statistics` says."""
        heads, _, statistics = self.one_pass(model, inputs, targets, head, parameters, differentiable=differentiable)
        if has_values(heads):
            refuse_infinite(bool(np.all(np.isfinite(np.asarray(heads, np.float64)))))
        return statistics

    def one_pass(
        self,
        model: Any,
        inputs: Any,
        targets: Any,
        head: HeadFunction,
        parameters: ParameterChoice,
        *,
        differentiable: bool,
        outputs: bool = False,
        mean: bool = False,
    ) -> tuple[Array, Any, list[LayerStatistics]]:
        """Return the heads (n, k), the model's outputs if they are asked for, and the layer statistics of the same pass.

        With `mean` the model returns the mean over a batch, (1, c), so that a sample's outputs are those of a batch of one.
        """
        model = functional(model)
        leaves = named(model.parameters)
        chosen = select(leaves, parameters)
        tree = jax.tree.structure(model.parameters)
        samples = [*leaves_of(inputs, finite=not mean), *map(jnp.asarray, jax.tree.leaves(targets))]
        _refuse_explicit([*leaves.values(), *samples])
        layout = jax.tree.structure((inputs, targets))
        n = samples[0].shape[0]

        def batch(leaves: list[Array], samples: list[Array]) -> list[Any]:
            inputs, targets = jax.tree.unflatten(layout, samples)
            with noting("model", inputs):
                found = model.function(jax.tree.unflatten(tree, leaves), inputs)
            return [scalars(found, head, targets, 1 if mean else samples[0].shape[0]), *([found] if outputs else [])]

        def one(leaves: list[Array], sample: list[Array]) -> list[Any]:
            of_one = [leaf[None] for leaf in sample]
            with known(of_one, samples):
                found = batch(leaves, of_one)
            return [jax.tree.map(lambda leaf: jax.lax.squeeze(leaf, (0,)), value) for value in found]

        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves.values()]
        slices = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in samples]
        traced, returned = jax.make_jaxpr(one, return_shape=True)(shapes, slices)
        _refuse_mapped(traced, samples)
        jaxpr = squeezed(traced)
        # shapes within the jaxpr, which a program keeps, belong to the mesh of a map around the call
        key = (fingerprint(jaxpr, constants=False), jax.sharding.get_abstract_mesh())
        program = program_for(key, jaxpr, list(leaves), chosen, differentiable)
        try:
            if n > 1:
                refuse_interaction(key, batch, jaxpr, list(leaves.values()), samples)
            if not differentiable:  # the heads still move with the samples and with what the function closes over
                leaves = jax.tree.map(jax.lax.stop_gradient, leaves)
            values, found = program.run(leaves, samples, jaxpr.consts)
        except (NotImplementedError, ValueError) as error:
            if "Reverse-mode differentiation" in str(error):
                raise UnsupportedModelError(
                    "`model` must be differentiable in reverse mode; got a while loop between a parameter and the outputs. "
                    "Use jax.lax.scan, or jax.lax.fori_loop with a fixed number of steps."
                ) from error
            if "vmap" in str(error) or (isinstance(error, NotImplementedError) and "atching" in str(error)):
                raise UnsupportedModelError(
                    f"`model` must be made of operations that jax.vmap maps over samples; got one that it does not: {error}. "
                    "Rewrite it."
                ) from error
            raise
        if not differentiable:
            found = jax.tree.map(jax.lax.stop_gradient, found)
        heads, *rest = jax.tree.unflatten(jax.tree.structure(returned), values)
        statistics = program.statistics(found) or [Rows(chosen[0], jnp.zeros((*heads.shape, 1), leaves[chosen[0]].dtype))]
        return heads, rest[0] if outputs else None, statistics

    def pure(self, function: Callable[[Any, Any], Any], parameters: Any) -> FunctionalModel:
        """Return the functional model of `function(parameters, inputs)`, whose parameters may be an nnx module."""
        return pure(function, parameters)

    def noting(self, name: str, arrays: Any) -> AbstractContextManager[None]:
        """Let errors of a user's function go on with a note that names the argument that it came by."""
        return noting(name, arrays)

    def value_and_gradient(self, function: Callable[..., Array]) -> Callable[..., tuple[Array, Tree]]:
        """Return a function that gives the value and the gradient in the first argument."""
        both: Callable[..., tuple[Array, Tree]] = jax.value_and_grad(function)
        return both

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function compiled."""
        compiled: Callable[..., Any] = jax.jit(function)
        return compiled


def _refuse_explicit(arrays: list[Array]) -> None:
    """Refuse arrays that are sharded over axes of a mesh which every operation must say how to go on with."""
    axes = sorted({str(axis) for array in arrays for axis in jax.typeof(array).sharding.spec if axis is not None})
    if axes:
        raise UnsupportedModelError(
            f"`inputs` and parameters must not be sharded over explicit axes of a mesh; got {', '.join(axes)}. Make "
            "the mesh by jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names)); or call within "
            "jax.set_mesh(mesh), in jax.sharding.auto_axes(function, out_sharding=jax.sharding.PartitionSpec())."
        )


def _refuse_mapped(traced: ClosedJaxpr, samples: list[Array]) -> None:
    """Refuse what ties a sample to the devices, or copies, of a map around the call."""
    axes = sorted({str(effect.name) for effect in traced.effects if type(effect).__name__ == "NamedAxisEffect"})
    if axes:
        raise UnsupportedModelError(
            "`model`, or `loss_fn`, must not use the axis of a map around it, which ties samples to those of other devices; got "
            f"`pmean`, `axis_index` or the like over {', '.join(axes)}. Take `pmean` of the loss and the gradient that come out."
        )
    for kind in map(jax.typeof, samples):
        kind = getattr(kind, "manual_axis_type", kind)  # which JAX 0.10 made of what was an attribute
        varying = ", ".join(sorted(map(str, getattr(kind, "varying", getattr(kind, "vma", ())))))
        if varying:
            raise UnsupportedModelError(
                "`jax.shard_map` must be called with check_vma=False around kernels and penalties; got a check of axis "
                f"{varying}. Or leave it out, for `jax.jit` takes sharded batches."
            )


backend = JaxBackend()
