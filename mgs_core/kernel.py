"""The kernel of per-sample model gradients, whole or in blocks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from mgs_core import _batch
from mgs_core._arguments import integer
from mgs_core._errors import ArgumentError
from mgs_core._namespace import array_namespace
from mgs_core._protocol import LayerStatistics, ParameterChoice
from mgs_core._registry import get_backend
from mgs_core._tree import kept_choice
from mgs_core._types import Array, LossFunction, Shaped
from mgs_core.contraction import contract
from mgs_core.heads import Output, Transform, make_head
from mgs_core.statistics import merge

_ALL = "None takes all samples at once."


def kernel(
    model: Any,
    inputs: Any,
    targets: Any = None,
    *,
    others: Any = None,
    other_targets: Any = None,
    output: Output = "trace",
    transform: Transform = "identity",
    loss: LossFunction | None = None,
    probes: int = 1,
    seed: int = 0,
    parameters: ParameterChoice = None,
    chunk_size: int | None = None,
    differentiable: bool = False,
) -> Shaped[Array, ...]:
    """Return the kernel of per-sample gradients, `K_ab = <∇_θ h(x_a), ∇_θ h(x_b)>`.

    The head h turns the outputs f(θ, x) into scalars. This is the empirical neural tangent kernel of the head: one step of
    gradient descent on x_b moves h(x_a) by `-η K_ab` to first order.

    Args:
        model: a `FunctionalModel`, or a model of a framework whose backend is installed.
        inputs: batch with n samples along the first axis: an array, or a dict, list or tuple of arrays.
        targets: labels (n,), probabilities (n, c), or whatever `loss` takes; needed for the heads "target" and "loss".
        others: batch with m samples, for the kernel between `inputs` and them, as of test and training samples; None for the
            kernel of `inputs` with themselves.
        other_targets: their targets, where the head needs `targets`.
        output: the head. "trace": `Σ_c <∇f_c(x_a), ∇f_c(x_b)>`, exact; "full": all pairs of outputs; "sum": `Σ_c f_c`;
            "target": the labelled output, of two or more, or a sum by shares of at least 0; "random": Rademacher probes over the
            outputs, unbiased for "trace"; "loss": the per-sample loss; or a callable `(outputs, targets) → (n,)`.
        transform: applied to the outputs before the head: "identity", "softmax", "log_softmax", "sigmoid" or a callable.
        loss: per-sample loss `(outputs, targets) → (n,)`, unreduced, for `output="loss"`; None is `cross_entropy`
            of logits; probabilities are refused where they are seen to be such.
        probes: number of probes of `output="random"`.
        seed: seed of the probes.
        parameters: None for all trainable parameters, names, or a predicate on names.
        chunk_size: samples in one pass; bounds the memory of the gradients, and changes the result by rounding only, where a
            sample's gradient owes nothing to the others of its batch. Where it does, a chunk is the batch: samples that meet in
            the data, as in `(x - x.mean(0)) @ w`, meet in a chunk alone, and dropout draws anew for each. With 1 no samples can
            interact, so a model whose samples do, such as batch normalisation in training, is another model.
        differentiable: keep the result differentiable in the parameters, for a penalty.

    Returns:
        (n, n), symmetric and positive semi-definite; (n, c, n, c) for `output="full"`. With `others` (n, m), or (n, c, m, c).

    Raises:
        ArgumentError: when an argument does not fit.
        SamplesInteractError: when one sample's output depends on another sample.
        UnsupportedModelError: when an operation of the model cannot be treated exactly.
        BackendError: when the framework of the model is not installed.

    Cost:
        One forward pass and k backward passes (k = c for "trace" and "full", `probes` for "random", else 1), plus the
        contraction of each layer (see `mgs_core.contraction`). B chunks take (B + 1)/2 times as many passes over the data; with
        `others`, these are passed once for each chunk of `inputs`.

    References:
        Szolnoky et al., NeurIPS 2022, arXiv 2205.12642 (the kernel); Jacot et al., NeurIPS 2018 (the tangent kernel).

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> model = mgs.FunctionalModel(lambda p, x: x @ p["weight"], {"weight": np.zeros((2, 1))})
        >>> mgs.kernel(model, np.array([[1.0, 0.0], [1.0, 2.0]]))  # of a linear model: X Xᵀ
        array([[1., 1.],
               [1., 5.]])
        >>> mgs.kernel(model, np.array([[1.0, 0.0], [1.0, 2.0]]), others=np.array([[0.0, 1.0]]))
        array([[0.],
               [2.]])
    """
    if chunk_size is None:
        chunk_size = max(_counts(inputs, targets, others, other_targets))
    blocks = kernel_blocks(
        model, inputs, targets, others=others, other_targets=other_targets, output=output, transform=transform, loss=loss,
        probes=probes, seed=seed, parameters=parameters, chunk_size=chunk_size, differentiable=differentiable,
    )  # fmt: skip
    rows: dict[int, list[Array]] = {}
    for left, right, block in blocks:
        rows.setdefault(left.start, []).append(block)
        if others is None and left != right:
            order = (2, 3, 0, 1) if block.ndim == 4 else (1, 0)
            rows.setdefault(right.start, []).append(array_namespace(block).permute_dims(block, order))
    if [len(row) for row in rows.values()] == [1]:
        return rows[0][0]
    xp = array_namespace(*(block for row in rows.values() for block in row))
    return xp.concat([xp.concat(row, axis=2 if row[0].ndim == 4 else 1) for _, row in sorted(rows.items())], axis=0)


def kernel_blocks(
    model: Any,
    inputs: Any,
    targets: Any = None,
    *,
    chunk_size: int,
    others: Any = None,
    other_targets: Any = None,
    output: Output = "trace",
    transform: Transform = "identity",
    loss: LossFunction | None = None,
    probes: int = 1,
    seed: int = 0,
    parameters: ParameterChoice = None,
    differentiable: bool = False,
) -> Iterator[tuple[slice, slice, Array]]:
    """Yield the blocks of the kernel on and above the diagonal, so that a kernel larger than memory can be streamed.

    Args:
        model: as for `kernel`.
        inputs: as for `kernel`.
        targets: as for `kernel`.
        chunk_size: samples along each side of a block, at least 1.
        others: as for `kernel`; all blocks are yielded then.
        other_targets: as for `kernel`.
        output: as for `kernel`.
        transform: as for `kernel`.
        loss: as for `kernel`.
        probes: as for `kernel`.
        seed: as for `kernel`.
        parameters: as for `kernel`.
        differentiable: as for `kernel`.

    Yields:
        (rows, columns, block): two slices of the samples and `K[rows, columns]`; row by row, each from the diagonal to the last
        column.

    Raises:
        ArgumentError: when an argument does not fit; raised when the first block is asked for.

    Cost:
        The statistics of two chunks are held at a time; B chunks take (B + 1)/2 passes over the data.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> model = mgs.FunctionalModel(lambda p, x: x @ p["weight"], {"weight": np.zeros((2, 1))})
        >>> for rows, columns, block in mgs.kernel_blocks(model, np.ones((3, 2)), chunk_size=2):
        ...     print(rows.start, columns.start, block.shape)
        0 0 (2, 2)
        0 2 (2, 1)
        2 2 (1, 1)
    """
    counts = _counts(inputs, targets, others, other_targets)
    chunk_size = integer("chunk_size", chunk_size, 1, _ALL)
    parameters = kept_choice(parameters)
    backend = get_backend(model)
    head = make_head(output, transform, loss, probes, seed, targets)
    if others is not None and output in ("target", "loss") and other_targets is None:
        raise ArgumentError(f'`other_targets` must be given for output="{output}"; got None. Pass the labels of `others`.')
    refuse = getattr(backend, "refuse_probabilities", None)
    if refuse is not None and output == "loss" and loss is None and transform == "identity":
        refuse(model)
    sides = [[slice(start, min(start + chunk_size, n)) for start in range(0, n, chunk_size)] for n in counts]

    def statistics(side: int, samples: slice) -> list[LayerStatistics]:
        batch, labels = (inputs, targets) if side == 0 else (others, other_targets)
        if len(sides[side]) > 1:
            batch, labels = _batch.take(batch, samples), _batch.take(labels, samples)
        return merge(backend.statistics(model, batch, labels, head.function, parameters, differentiable=differentiable))

    def scaled(block: Array) -> Array:
        return block if head.factor == 1.0 else block * head.factor

    chunks = sides[0]
    summed = getattr(backend, "summed_kernel", None)
    if others is None and summed is not None and len(chunks) == 1 and not head.full and not differentiable:
        yield chunks[0], chunks[0], scaled(summed(model, inputs, targets, head.function, parameters))
        return
    for number, rows in enumerate(chunks):
        left = statistics(0, rows)
        for columns in chunks[number:] if others is None else sides[1]:
            right = left if columns is rows else statistics(len(sides) - 1, columns)
            block = scaled(contract(left, right, full=head.full))
            del right  # before those of the next chunk are made
            yield rows, columns, block
        del left


def _counts(inputs: Any, targets: Any, others: Any, other_targets: Any) -> tuple[int, ...]:
    """Return the number of samples along the rows, and along the columns where these are others."""
    if others is not None:
        return _batch.count(inputs, targets), _batch.count(others, other_targets, ("others", "other_targets"))
    if other_targets is not None:
        raise ArgumentError("`other_targets` must be None without `others`, whose targets they are. Pass `others` too.")
    return (_batch.count(inputs, targets),)


def check_options(options: Mapping[str, Any], targets: Any) -> dict[str, Any]:
    """Refuse options of `kernel` that it would refuse, before there is a model to measure; return them for repeated use.

    Args:
        options: keyword arguments.
        targets: what will be passed besides.

    Returns:
        The options; names of parameters that an iterator gave, which gives them once, as a list.

    Raises:
        ArgumentError: when one is unknown or does not fit.
    """
    parameters = inspect.signature(kernel).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and "other" not in name}
    unknown = [name for name in options if name not in defaults]
    if unknown:
        raise ArgumentError(
            f"`kernel_options` must be among {', '.join(defaults)}; got {', '.join(unknown)}. Check the spelling."
        )
    given = {**defaults, **options}
    make_head(given["output"], given["transform"], given["loss"], given["probes"], given["seed"], targets)
    if given["chunk_size"] is not None:
        integer("chunk_size", given["chunk_size"], 1, _ALL)
    return {**options, "parameters": kept_choice(options["parameters"])} if "parameters" in options else dict(options)
