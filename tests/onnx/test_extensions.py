"""The portable defaults of the namespace extensions, on array_api_strict, against NumPy's and torch's own functions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mgs_core.onnx.extensions import extension, portable

strict = pytest.importorskip("array_api_strict")
RANDOM = np.random.default_rng(0)


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-12)


def arrays(*values):
    return [strict.asarray(value) for value in values]


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_and_its_adjoint(groups):
    torch = pytest.importorskip("torch")
    x, w, back = (
        RANDOM.normal(size=(2, 4, 7, 6)),
        RANDOM.normal(size=(6, 4 // groups, 3, 2)),
        RANDOM.normal(size=(4, 6 // groups, 3, 2)),
    )
    padded = torch.nn.functional.pad(torch.tensor(x), (0, 1, 1, 1))
    expected = torch.conv2d(padded, torch.tensor(w), stride=(2, 1), dilation=(1, 2), groups=groups)
    options = {"dilations": (1, 2), "groups": groups}
    close(portable(strict, "convolution")(*arrays(x, w), strides=(2, 1), pads=((1, 1), (0, 1)), **options), expected)
    expected = torch.nn.functional.conv_transpose2d(
        torch.tensor(x), torch.tensor(back), stride=(2, 3), padding=1, output_padding=(1, 2), dilation=(1, 2), groups=groups
    )
    options |= {"strides": (2, 3), "pads": ((1, 1), (1, 1)), "output_padding": (1, 2)}
    close(portable(strict, "convolution_transpose")(*arrays(x, back), **options), expected)


def test_pooling():
    torch = pytest.importorskip("torch")
    x = RANDOM.normal(size=(2, 3, 7, 6))
    options = {"window": (3, 2), "strides": (2, 1), "pads": ((1, 1), (1, 1)), "dilations": (1, 1)}
    functional = torch.nn.functional
    close(portable(strict, "max_pool")(strict.asarray(x), **options), functional.max_pool2d(torch.tensor(x), (3, 2), (2, 1), 1))
    close(
        portable(strict, "average_pool")(strict.asarray(x), **options), functional.avg_pool2d(torch.tensor(x), (3, 2), (2, 1), 1)
    )


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter(reduction):
    data, places, values = RANDOM.normal(size=6), np.array([0, 2, 2, 5]), RANDOM.normal(size=4)
    expected = data.copy()
    if reduction == "none":
        expected[places] = values
    else:
        getattr(np, {"mul": "multiply", "max": "maximum", "min": "minimum"}.get(reduction, reduction)).at(
            expected, places, values
        )
    write = portable(strict, "scatter")
    close(write(*arrays(data, places, values), reduction=reduction), expected)
    nothing = write(*arrays(data, places[:0], values[:0]), reduction=reduction)
    close(nothing, data)


def test_scatter_refuses_other_reductions():
    with pytest.raises(ValueError, match="`reduction` must be none, add, mul, max or min; got 'mean'"):
        portable(strict, "scatter")(*arrays(np.ones(2), np.array([0]), np.ones(1)), reduction="mean")


@pytest.mark.parametrize("equation", ["ab,bc->ac", "abc,cad,de->eb", "ab,ab->", "a,b->ba", "ab->b", "abc,ac->cb"])
def test_einsum(equation):
    sizes = dict(zip("abcde", (3, 4, 5, 2, 6), strict=True))
    operands = [RANDOM.normal(size=[sizes[letter] for letter in label]) for label in equation.split("->")[0].split(",")]
    close(portable(strict, "einsum")(equation, *arrays(*operands)), np.einsum(equation, *operands))


def test_elementwise_functions_and_lookup():
    x = np.concatenate([np.linspace(-8, 8, 4001), [0.0, -0.0, 1e-300]])
    close(portable(strict, "erf")(strict.asarray(x)), [math.erf(value) for value in x])
    close(portable(strict, "sigmoid")(strict.asarray(x)), [1 / (1 + math.exp(-value)) for value in x])
    close(portable(strict, "relu")(strict.asarray(x)), np.maximum(x, 0))
    rows = RANDOM.normal(size=(3, 4))
    shares = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    close(portable(strict, "softmax")(strict.asarray(rows), 1), shares)
    close(portable(strict, "log_softmax")(strict.asarray(rows), 1), np.log(shares))
    places = RANDOM.integers(0, 3, (2, 5))
    close(portable(strict, "lookup")(*arrays(rows, places)), rows[places])
    close(
        portable(strict, "pad")(strict.asarray(rows), ((1, 0), (2, 3)), value=7.0),
        np.pad(rows, ((1, 0), (2, 3)), constant_values=7),
    )


def test_a_namespace_may_bring_its_own():
    own = type("Namespace", (), {"mgs_relu": staticmethod(lambda x: "own")})
    assert extension(own, "relu")(None) == "own"
