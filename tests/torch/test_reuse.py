"""The weighted gradient from the statistics of the kernel, for every model in the zoo."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip


def test_gradient_from_the_statistics_is_that_of_a_backward_pass(case):
    model, x = case
    weighted, plain = (MGSLoss(lambda o, _: o.sin().sum(1), weighting="agreement", reuse=reuse) for reuse in (True, False))
    gradients = []
    for criterion in (weighted, plain):
        outputs = model(*x) if isinstance(x, tuple) else model(x)
        model.zero_grad()
        (3.0 * criterion(outputs, None)).backward()
        gradients.append([value.grad for value in model.parameters() if value.grad is not None])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):  # both free the graph
            outputs.sum().backward()
    assert len(gradients[0]) == len(gradients[1]) > 0
    for part, other in zip(*gradients, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-12)
