"""Matrix products."""

from __future__ import annotations

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.registry import Run, operator


@operator("MatMul")
def matmul(node: Node, xp: Namespace) -> Run:
    """Multiply matrices, or stacks of them."""

    def run(a: Array, b: Array) -> Array:
        if a.ndim > 1 and b.ndim > 1:
            return xp.matmul(a, b)
        rows, columns = (a.ndim == 1), (b.ndim == 1)  # vectors, which not every framework takes
        y = xp.matmul(xp.expand_dims(a, axis=0) if rows else a, xp.expand_dims(b, axis=1) if columns else b)
        shape = tuple(y.shape)
        kept = shape[:-2] + shape[-2:-1] * (not rows) + shape[-1:] * (not columns)
        return xp.reshape(y, kept)

    return run


@operator("Gemm", since=7)
def gemm(node: Node, xp: Namespace) -> Run:
    """Return α·A B + β·C, A and B transposed on demand."""
    alpha, beta = node.attributes["alpha"], node.attributes["beta"]
    left, right = node.attributes["transA"], node.attributes["transB"]

    def run(a: Array, b: Array, c: Array = None) -> Array:
        a = xp.permute_dims(a, (1, 0)) if left else a
        b = xp.permute_dims(b, (1, 0)) if right else b
        y = xp.matmul(a, b)
        y = y if alpha == 1.0 else alpha * y
        if c is None or beta == 0.0:
            return y
        return y + (c if beta == 1.0 else beta * c)

    return run


@operator("Einsum", since=12)
def einsum(node: Node, xp: Namespace) -> Run:
    """Return an Einstein sum."""
    equation = node.attributes["equation"].replace(" ", "")
    product = extension(xp, "einsum")

    def run(*operands: Array) -> Array:
        plain, arranged = explicit(node, xp, equation, operands)
        return product(plain, *arranged)

    return run


def explicit(node: Node, xp: Namespace, equation: str, operands: tuple[Array, ...]) -> tuple[str, list[Array]]:
    """Return the equation with an arrow, without ellipses, and without letters that an operand repeats.

    Args:
        node: for messages.
        xp: namespace.
        equation: as in the file, without blanks.
        operands: arrays.

    Returns:
        (equation, operands), diagonals taken.

    Raises:
        ArgumentError: when equation and operands do not fit.
    """
    sides, arrow, out = equation.partition("->")
    labels = sides.split(",")
    if len(labels) != len(operands) or not set(equation) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.->"):
        raise node.damaged(f"has an equation {equation!r} that does not fit its {len(operands)} inputs")
    spare = [letter for letter in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSRQPONMLKJIHGFEDCBA" if letter not in equation]
    hidden = max(
        (x.ndim - len(label.replace("...", "")) for label, x in zip(labels, operands, strict=True) if "..." in label), default=0
    )
    letters = "".join(spare[:hidden])
    full, arranged = [], []
    for label, x in zip(labels, operands, strict=True):
        count = x.ndim - len(label.replace("...", ""))
        label = label.replace("...", letters[hidden - count :] if count > 0 else "")
        if len(label) != x.ndim or "." in label:
            raise node.damaged(f"has an equation {equation!r} that does not fit an input with {x.ndim} axes")
        label, x = _diagonal(xp, label, x)
        full.append(label)
        arranged.append(x)
    if not arrow:
        joined = "".join(full)
        single = sorted(letter for letter in set(joined) if joined.count(letter) == 1 and letter not in letters)
        repeated = {letter for label in labels for letter in label if label.count(letter) > 1}
        out = letters + "".join(letter for letter in single if letter not in repeated)
    out = out.replace("...", letters)
    if not set(out) <= set("".join(full)) or len(set(out)) != len(out):
        raise node.damaged(f"has an equation {equation!r} whose result has unknown or repeated letters")
    return f"{','.join(full)}->{out}", arranged


def _diagonal(xp: Namespace, label: str, x: Array) -> tuple[str, Array]:
    """Take diagonals until no letter repeats."""
    for letter in sorted(set(label)):
        while label.count(letter) > 1:
            a = label.index(letter)
            b = label.index(letter, a + 1)
            rest = [axis for axis in range(x.ndim) if axis not in (a, b)]
            size = x.shape[a]
            flat = xp.reshape(xp.permute_dims(x, (a, b, *rest)), (size * size, *(x.shape[axis] for axis in rest)))
            x = flat[(slice(None, None, size + 1), ...)]
            label = letter + "".join(label[axis] for axis in rest)
    return label, x
