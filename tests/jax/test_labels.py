"""Labels that name no output: refused where their values are known, NaN where they are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mgs_core.adapters.flax import MGSMonitor, regularized

import mgs_core as mgs


def linear(p, x):
    return x @ p["w"]


@pytest.mark.parametrize("output", ["loss", "target"])
@pytest.mark.parametrize("labels", [[0, 3, 1, 2], [0, -1, 1, 2]])
def test_known_labels_that_name_no_output_are_refused(output, labels):
    parameters, x, y = {"w": jnp.ones((2, 3))}, jnp.arange(8.0).reshape(4, 2), jnp.asarray(labels)
    message = rf"`targets` must be labels in 0..2; got {min(labels)}..{max(labels)}"
    with pytest.raises(mgs.ArgumentError, match=message):
        mgs.kernel(mgs.FunctionalModel(linear, parameters), x, y, output=output)
    model = mgs.FunctionalModel(lambda p, x: {"logits": linear(p, x)}, parameters)
    with pytest.raises(mgs.ArgumentError, match=message):  # picked from a dict of outputs, and the labels known within jit
        jax.jit(lambda x: mgs.kernel(model, x, y, output=output, transform=lambda outputs: outputs["logits"]))(x)
    with pytest.raises(mgs.ArgumentError, match=message):
        MGSMonitor(linear, x, y, output=output).step(parameters)
    loss = regularized(lambda p, batch: jnp.mean(mgs.cross_entropy(linear(p, batch[0]), batch[1])), mgs.Penalty("trace"))
    with pytest.raises(mgs.ArgumentError, match=message):
        jax.value_and_grad(loss, has_aux=True)(parameters, (x, y))
    with pytest.raises(mgs.ArgumentError, match="`targets` must be integers to be labels; got dtype float"):
        mgs.kernel(mgs.FunctionalModel(linear, parameters), x, y + 0.5, output=output)
    changed = mgs.kernel(
        mgs.FunctionalModel(linear, parameters), x, y, loss=lambda o, y: mgs.cross_entropy(o, y % 3), output="loss"
    )
    np.testing.assert_array_equal(
        changed, mgs.kernel(mgs.FunctionalModel(linear, parameters), x, (y % 3).astype(float), output="loss")
    )


@pytest.mark.parametrize("output", ["loss", "target"])
def test_unknown_labels_that_name_no_output_give_nan(output):
    parameters, x, y = {"w": jnp.ones((2, 3))}, jnp.arange(8.0).reshape(4, 2), jnp.asarray([0, 3, 1, -1])
    kernel = jax.jit(lambda y: mgs.kernel(mgs.FunctionalModel(linear, parameters), x, y, output=output))
    good = np.isin(np.arange(4), [0, 2])
    expected = np.where(good[:, None] & good, kernel(jnp.asarray([0, 0, 1, 1])), np.nan)
    np.testing.assert_allclose(kernel(y), expected)
    loss = regularized(lambda p, batch: jnp.mean(mgs.cross_entropy(linear(p, batch[0]), batch[1])), mgs.Penalty("trace"))
    assert np.isnan(jax.jit(loss)(parameters, (x, y))[0])
