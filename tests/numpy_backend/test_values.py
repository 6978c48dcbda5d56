"""Models in which values decide whether samples interact: a later batch that mixes them is refused, as the first would be."""

from __future__ import annotations

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from mgs_oracles import close

import mgs_core as mgs

_N = 6
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(_N, 3))
PARAMETERS = {"w": RANDOM.normal(size=(3, 5)), "v": RANDOM.normal(size=(5, 2))}
EYE, ORDER, GROUPS = np.eye(_N), np.array([3, 1, 0, 2, 5, 4]), np.array([0, 0, 1, 1, 2, 2])
RISING, MIXED = np.arange(6.0), np.array([3.0, 1, 0, 2, 5, 4])


def attention(h, mask):
    scores = anp.where(mask, h @ h.T, -1e9 * anp.ones((_N, _N)))
    scores = anp.exp(scores - anp.max(scores, axis=-1, keepdims=True))
    return h + scores / anp.sum(scores, axis=-1, keepdims=True) @ h


# how h (n, d) goes on, by what the batch brings along: at first each sample for itself, then not
MIXING = {
    "factor": (lambda h, s: h + s * anp.mean(h, 0), np.zeros((_N, 1)), np.ones((_N, 1))),
    "number": (lambda h, s: h + s[0] * anp.mean(h, 0), np.zeros((_N, 1)), np.ones((_N, 1))),
    "first sample": (lambda h, s: h + s * h[:1], np.zeros((_N, 1)), np.ones((_N, 1))),
    "second next": (lambda h, s: h + s * anp.concatenate([h[2:], h[:2]]), np.zeros((_N, 1)), np.ones((_N, 1))),
    "gate": (lambda h, s: h + anp.maximum(anp.mean(anp.tanh(h), 0) + s, 0.0), np.full((_N, 1), -2.0), np.full((_N, 1), 2.0)),
    "attention": (attention, EYE > 0, EYE > -1),
    "groups": (lambda h, g: attention(h, g[:, None] == g), np.arange(_N), GROUPS),
    "mask of pairs": (
        lambda h, m: anp.sum(anp.where(m[:, :, None], anp.tanh(h)[None] * np.ones((_N, 1, 1)), np.zeros((_N, _N, 5))), 1),
        EYE > 0,
        EYE > -1,
    ),
    "index": (lambda h, i: h[i], np.arange(_N), ORDER),
    "index of the transpose": (lambda h, i: h.T[:, i].T, np.arange(_N), ORDER),
    "matrix": (lambda h, a: a @ h, EYE, EYE[ORDER]),
    "matrix on the right": (lambda h, a: (h.T @ a.T).T, EYE, EYE[ORDER]),
    "slice": (lambda h, s: h[:: int(s[0])], np.ones(_N), -np.ones(_N)),
    "sort": (lambda h, s: h + anp.sort(anp.tanh(h[:, 0]) + 10 * s)[:, None], RISING, MIXED),
}


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("name", MIXING)
def test_a_later_batch_that_mixes_samples_is_refused_or_exact(name, before):
    mix, alone, together = MIXING[name]

    def function(p, inputs):
        return anp.tanh(mix(inputs["x"] @ p["w"], inputs["given"])) @ p["v"]

    model = mgs.FunctionalModel(function, PARAMETERS)
    for given in [alone] * before + [together]:
        inputs = {"x": X, "given": given}
        # of the whole batch: each sample's gradient with all that it depends on
        jacobian = [
            autograd.jacobian(lambda value, name=name, inputs=inputs: anp.sum(function({**PARAMETERS, name: value}, inputs), 1))
            for name in PARAMETERS
        ]
        parts = [part(value).reshape(_N, -1) for part, value in zip(jacobian, PARAMETERS.values(), strict=True)]
        rows = np.concatenate(parts, 1)
        try:
            kernel = mgs.kernel(model, inputs, output="sum")
        except mgs.SamplesInteractError:
            assert given is together
        else:
            close(kernel, rows @ rows.T)


@pytest.mark.parametrize("normalised", [False, True])
def test_half_precision_hides_no_interaction(normalised):
    values = {name: value.astype(np.float16) for name, value in PARAMETERS.items()}

    def model(factor):
        def function(p, x):
            w = p["w"] / anp.sqrt(anp.sum(p["w"] ** 2, axis=0, keepdims=True)) if normalised else p["w"]  # then rows
            h = x @ w
            return anp.tanh(h + np.asarray(factor, h.dtype) * anp.mean(h, 0)) @ p["v"]

        return function

    for factor in (0.05, 0.2, 0.5):
        with pytest.raises(mgs.SamplesInteractError, match="treat each sample by itself"):
            mgs.kernel(mgs.FunctionalModel(model(factor), values), X.astype(np.float16))
    kernel = mgs.kernel(mgs.FunctionalModel(model(0.0), values), X.astype(np.float16))
    close(kernel, mgs.kernel(mgs.FunctionalModel(model(0.0), PARAMETERS), X), 0.02)
