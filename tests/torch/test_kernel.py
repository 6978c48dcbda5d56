"""The kernel of every model in the zoo against a per-sample loop of ordinary gradients, and its penalties' gradients."""

from __future__ import annotations

import numpy as np
import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

PENALTY = mgs.Penalty("log_determinant", strength=1.0, scale=2.0)


def close(actual, expected, tolerance: float = 1e-12) -> None:
    expected = expected.detach().numpy()
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


def trainable(model):
    return [value for value in model.parameters() if value.requires_grad]


def call(model, x):
    return model(*x) if isinstance(x, tuple) else model(x)


def take(x, samples):
    return tuple(part[samples] for part in x) if isinstance(x, tuple) else x[samples]


def count(x):
    return len(x[0]) if isinstance(x, tuple) else len(x)


def jacobian_rows(model, x, *, create_graph: bool = False):
    """A loop of ordinary gradients, one sample in the batch at a time: (n, c, p)."""
    rows = []
    for a in range(count(x)):
        outputs = call(model, take(x, slice(a, a + 1)))
        for output in outputs[0]:
            gradients = torch.autograd.grad(
                output, trainable(model), retain_graph=True, create_graph=create_graph, materialize_grads=True, allow_unused=True
            )
            rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    return torch.stack(rows).reshape(count(x), -1, rows[0].numel())


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_kernel_is_that_of_a_per_sample_loop(case, chunk_size):
    model, x = case
    rows = jacobian_rows(model, x)
    close(mgs.kernel(model, x, output="full", chunk_size=chunk_size), torch.einsum("acp,bdp->acbd", rows, rows))
    close(mgs.kernel(model, x, chunk_size=chunk_size), torch.einsum("acp,bcp->ab", rows, rows))
    close(mgs.kernel(model, x, output="sum", chunk_size=chunk_size), torch.einsum("acp,bdp->ab", rows, rows))
