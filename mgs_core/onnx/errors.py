"""How a file is refused: each refusal names the node or tensor, says what is wrong and how to go on."""

from __future__ import annotations

from mgs_core._errors import ArgumentError, UnsupportedModelError


def damaged(where: str, problem: str, remedy: str = "Export the model again.") -> ArgumentError:
    """Return the error for a file that breaks the rules of ONNX.

    Args:
        where: the node, tensor or part.
        problem: what is wrong with it.
        remedy: how to go on.

    Returns:
        The error, to be raised.
    """
    return ArgumentError(f"`model` must be a valid ONNX model; {where} {problem}. {remedy}")


def unsupported(where: str, problem: str, remedy: str) -> UnsupportedModelError:
    """Return the error for a valid model that this library does not evaluate.

    Args:
        where: the node, tensor or part.
        problem: what is not supported.
        remedy: how to go on.

    Returns:
        The error, to be raised.
    """
    return UnsupportedModelError(f"`model` must be one that mgs_core evaluates exactly; {where} {problem}. {remedy}")
