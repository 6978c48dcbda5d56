"""The oracles of the method, against models as users write them, in float64 on the NumPy backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from mgs_oracles import check_kernels, check_symmetries, close, directions, slope

import mgs_core as mgs
from mgs_core._protocol import Rows, Scale
from mgs_core.contraction import contract

RANDOM = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape)


def mlp(p, x):
    return anp.dot(anp.tanh(x @ p["w1"] + p["b1"]), p["w2"]) + p["b2"]


def normalised(p, x):
    h = x @ p["w1"]
    mean = anp.mean(h, axis=-1, keepdims=True)
    variance = anp.mean((h - mean) ** 2, axis=-1, keepdims=True)
    return anp.dot(anp.maximum((h - mean) / anp.sqrt(variance + 1e-5) * p["gain"] + p["shift"], 0.0), p["w2"])


def sequence(p, x):  # (n, s, i): a weight shared over positions, then attention
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    scores = anp.matmul(q, anp.swapaxes(k, -1, -2))
    scores = anp.exp(scores - anp.max(scores, axis=-1, keepdims=True))
    mixed = anp.matmul(scores / anp.sum(scores, axis=-1, keepdims=True), v) + p["position"]
    return anp.mean(anp.tanh(mixed), axis=1) @ p["out"]


def sequence_first(p, x):  # positions before samples inside
    h = anp.tanh(anp.transpose(x, (1, 0, 2)) @ p["w1"])
    flat = anp.reshape(h, (-1, h.shape[-1])) @ p["w2"]
    return anp.sum(anp.reshape(flat, (x.shape[1], x.shape[0], -1)), axis=0)


def shared(p, x):  # one weight, twice, once transposed; a bias used by two layers
    h = anp.tanh(x @ p["w"] + p["b"])
    return anp.tanh(h @ p["w"].T) @ p["w"] + p["b"]


def twice(p, x):  # the same use twice: recurrence
    h = x
    for _ in range(3):
        h = anp.tanh(h @ p["w"] + p["b"])
    return h


def tied(p, x):  # embedding and output weight are one; ids are the data
    h = anp.tanh(anp.mean(p["table"][x] * p["gain"], axis=1) / p["divisor"])
    return h @ p["table"].T - p["b"]


def derived(p, x):  # weights that are functions of parameters: rows
    w = p["v"] / anp.sqrt(anp.sum(p["v"] ** 2, axis=0, keepdims=True)) + p["a"] @ p["c"]
    return anp.tanh(x @ w) @ p["w2"]


def grouped(p, x):  # one weight for each group
    h = anp.tanh(anp.matmul(anp.reshape(x, (x.shape[0], 2, 1, -1)), p["w"]))
    return anp.reshape(h, (x.shape[0], -1)) @ p["out"]


def left(p, x):  # weight on the left, samples last
    return anp.transpose(anp.tanh(p["w"] @ x.T + p["b"][:, None]))


def sliced(p, x):  # packed weights
    return anp.tanh(x @ p["w"][:, :3]) * (x @ p["w"][:, 3:]) + p["b"][0]


MODELS: dict[str, tuple[Callable[..., np.ndarray], dict[str, np.ndarray], np.ndarray]] = {
    "mlp": (mlp, {"w1": draw(5, 7), "b1": draw(7), "w2": draw(7, 3), "b2": draw(3)}, draw(6, 5)),
    "wide": (mlp, {"w1": draw(2, 3), "b1": draw(3), "w2": draw(3, 2), "b2": draw(2)}, draw(20, 2)),
    "normalised": (normalised, {"w1": draw(5, 7), "gain": draw(7), "shift": draw(7), "w2": draw(7, 3)}, draw(6, 5)),
    "sequence": (
        sequence,
        {"q": draw(4, 4), "k": draw(4, 4), "v": draw(4, 5), "position": draw(3, 5), "out": draw(5, 2)},
        draw(6, 3, 4),
    ),
    "square": (
        sequence,
        {"q": draw(4, 4), "k": draw(4, 4), "v": draw(4, 4), "position": draw(4, 4), "out": draw(4, 4)},
        draw(4, 4, 4),
    ),
    "sequence_first": (sequence_first, {"w1": draw(4, 5), "w2": draw(5, 2)}, draw(6, 3, 4)),
    "shared": (shared, {"w": draw(4, 5), "b": draw(5)}, draw(6, 4)),
    "twice": (twice, {"w": draw(4, 4), "b": draw(4)}, draw(6, 4)),
    "tied": (
        tied,
        {"table": draw(8, 4), "gain": draw(4), "divisor": 2.0 + draw(4) ** 2, "b": draw(8)},
        RANDOM.integers(0, 8, (6, 3)),
    ),
    "derived": (derived, {"v": draw(5, 4), "a": draw(5, 2), "c": draw(2, 4), "w2": draw(4, 3)}, draw(6, 5)),
    "grouped": (grouped, {"w": draw(2, 3, 4), "out": draw(8, 3)}, draw(6, 6)),
    "left": (left, {"w": draw(3, 5), "b": draw(3)}, draw(6, 5)),
    "sliced": (sliced, {"w": draw(5, 6), "b": draw(2, 3)}, draw(6, 5)),
}


def jacobian_rows(function, parameters, x) -> np.ndarray:
    """A loop of ordinary gradients: (n, c, p)."""
    c = function(parameters, x).shape[1]
    rows = []
    for a in range(len(x)):
        for k in range(c):
            gradient = autograd.grad(lambda p, a=a, k=k: function(p, x[a : a + 1])[0, k])(parameters)
            rows.append(np.concatenate([np.ravel(gradient[name]) for name in parameters]))
    return np.reshape(rows, (len(x), c, -1))


@pytest.fixture(params=MODELS, ids=list(MODELS))
def case(request):
    return MODELS[request.param]


def test_kernel_is_that_of_a_per_sample_loop(case):
    function, parameters, x = case
    rows, model = jacobian_rows(function, parameters, x), mgs.FunctionalModel(function, parameters)
    check_kernels(partial(mgs.kernel, model, x), rows)
    for chunk_size in (None, 1):
        close(mgs.kernel(model, x, output="sum", chunk_size=chunk_size), np.einsum("acp,bdp->ab", rows, rows))


def test_sum_of_the_kernel_is_the_norm_of_the_batch_gradient(case):
    function, parameters, x = case
    gradient = autograd.grad(lambda p: anp.sum(function(p, x)))(parameters)
    norm = sum(np.sum(g**2) for g in gradient.values())
    close(np.sum(mgs.kernel(mgs.FunctionalModel(function, parameters), x, output="sum")), norm)


def test_permuting_samples_permutes_the_kernel_and_layers_add_up(case):
    function, parameters, x = case
    check_symmetries(partial(mgs.kernel, mgs.FunctionalModel(function, parameters)), parameters, x)


def test_scaled_head_scales_the_kernel_by_the_square(case):
    function, parameters, x = case
    model = mgs.FunctionalModel(function, parameters)
    close(mgs.kernel(model, x, transform=lambda outputs: 3.0 * outputs), 9.0 * mgs.kernel(model, x))


@pytest.mark.parametrize("output", ["loss", "target", "random", "trace"])
def test_gradient_of_a_penalty_is_that_of_central_differences(case, output):
    function, parameters, x = case
    y = np.arange(len(x)) % function(parameters, x).shape[1]
    penalty = mgs.Penalty("log_determinant", strength=1.0, scale=2.0)

    def objective(p):
        model = mgs.FunctionalModel(function, p)
        loss = squared if output == "loss" else None
        return penalty(mgs.kernel(model, x, y, output=output, transform="softmax", differentiable=True, loss=loss))

    def squared(outputs, labels):
        return anp.sum((outputs - 1.0 / (1.0 + labels[:, None])) ** 2, axis=1)

    _, gradient = mgs.get_backend("numpy").value_and_gradient(objective)(parameters)
    direction = directions(parameters)
    actual = sum(np.sum(gradient[name] * direction[name]) for name in parameters)
    expected = slope(lambda t: objective({name: value + t * direction[name] for name, value in parameters.items()}))
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_linear_model_has_the_gram_matrix_of_its_inputs():
    x = draw(7, 4)
    parameters = {"w": draw(4, 1), "b": draw(1)}
    model = mgs.FunctionalModel(lambda p, x: x @ p["w"] + p["b"], parameters)
    close(mgs.kernel(model, x), x @ x.T + 1.0, 1e-14)
    close(mgs.kernel(model, x, parameters="w"), x @ x.T, 1e-14)


def test_random_probes_average_to_the_trace():
    function, parameters, x = MODELS["mlp"]
    model = mgs.FunctionalModel(function, parameters)
    close(mgs.kernel(model, x, output="random", probes=4000), mgs.kernel(model, x), 0.05)
    one = mgs.kernel(model, x, output="random", seed=1)
    close(mgs.kernel(model, x, output="random", seed=1), one, 1e-15)
    assert not np.allclose(mgs.kernel(model, x, output="random", seed=2), one)


def test_loss_head_and_target_head():
    function, parameters, x = MODELS["mlp"]
    rows, y = jacobian_rows(function, parameters, x), np.array([0, 1, 2, 0, 1, 2])
    model = mgs.FunctionalModel(function, parameters)
    chosen = rows[np.arange(6), y]
    close(mgs.kernel(model, x, y, output="target"), chosen @ chosen.T)
    outputs = function(parameters, x)
    residual = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True) - np.eye(3)[y]
    loss_rows = np.einsum("ac,acp->ap", residual, rows)
    close(mgs.kernel(model, x, y, output="loss"), loss_rows @ loss_rows.T)


def test_one_sample_and_duplicates():
    function, parameters, x = MODELS["mlp"]
    model = mgs.FunctionalModel(function, parameters)
    whole = mgs.kernel(model, x)
    close(mgs.kernel(model, x[:1]), whole[:1, :1])
    close(mgs.kernel(model, x[[0, 0, 1]]), whole[np.ix_([0, 0, 1], [0, 0, 1])])


def test_float32_stays_float32_and_close():
    function, parameters, x = MODELS["mlp"]
    single = mgs.FunctionalModel(function, {name: value.astype(np.float32) for name, value in parameters.items()})
    kernel = mgs.kernel(single, x.astype(np.float32))
    assert kernel.dtype == np.float32
    close(kernel, mgs.kernel(mgs.FunctionalModel(function, parameters), x), 1e-5)
    # autograd gives the gradient of a maximum in float64, which would double the cost of all that comes after
    rectified = lambda p: anp.sum(anp.maximum(x.astype(np.float32) @ p["w1"], 0.0) @ p["w2"])  # noqa: E731  # used once
    _, gradient = mgs.get_backend("numpy").value_and_gradient(rectified)(single.parameters)
    assert {value.dtype for value in gradient.values()} == {np.dtype(np.float32)}


def test_batch_statistics_are_refused():
    def batch_normalised(p, x):
        h = x @ p["w1"]
        return anp.tanh((h - anp.mean(h, axis=0)) / anp.std(h, axis=0)) @ p["w2"]

    model = mgs.FunctionalModel(batch_normalised, {"w1": draw(5, 7), "w2": draw(7, 3)})
    with pytest.raises(mgs.SamplesInteractError, match="samples that interact in front of parameter 'w1'"):
        mgs.kernel(model, draw(6, 5))
    assert mgs.kernel(model, draw(6, 5), parameters="w2").shape == (6, 6)
    assert not mgs.check(model, draw(6, 5)).ok


@pytest.mark.parametrize("output", ["trace", "sum", "random"])
def test_batch_statistics_are_refused_where_equal_weights_hide_them(output):
    """Behind a mean over the batch that is subtracted, the gradient of the plain sum of linear outputs is zero."""
    parameters = {"first": draw(5, 7), "last": draw(7, 3), "gain": draw(7)}
    for mix in (lambda h: h - anp.mean(h, axis=0), lambda h: (h - anp.mean(h, axis=0)) / anp.std(h, axis=0)):
        for out in (lambda p, h: h, lambda p, h: h + p["gain"], lambda p, h: h * p["gain"], lambda p, h: h @ p["last"]):
            model = mgs.FunctionalModel(lambda p, x, mix=mix, out=out: out(p, mix(x @ p["first"])), parameters)
            with pytest.raises(mgs.SamplesInteractError, match="samples that interact in front of parameter 'first'"):
                mgs.kernel(model, draw(6, 5), output=output)


def test_user_objects_are_untouched():
    function, parameters, x = MODELS["mlp"]
    before, inputs = {k: v.copy() for k, v in parameters.items()}, x.copy()
    state = np.random.get_state()[1].copy()
    mgs.kernel(mgs.FunctionalModel(function, parameters), x, output="random")
    np.testing.assert_array_equal(x, inputs)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    for name, value in parameters.items():
        np.testing.assert_array_equal(value, before[name])


def test_parameters_by_predicate_and_nested_trees():
    function, parameters, x = MODELS["mlp"]
    nested = {"first": [parameters["w1"], parameters["b1"]], "second": (parameters["w2"], parameters["b2"])}
    model = mgs.FunctionalModel(
        lambda p, x: function({"w1": p["first"][0], "b1": p["first"][1], "w2": p["second"][0], "b2": p["second"][1]}, x), nested
    )
    flat = mgs.FunctionalModel(function, parameters)
    close(mgs.kernel(model, x), mgs.kernel(flat, x))
    close(mgs.kernel(model, x, parameters=lambda name: name.startswith("second")), mgs.kernel(flat, x, parameters=["w2", "b2"]))


def test_a_head_that_no_parameter_moves_gives_zero():
    model = mgs.FunctionalModel(lambda p, x: x, {"w": draw(2, 2)})
    np.testing.assert_array_equal(mgs.kernel(model, draw(3, 2)), np.zeros((3, 3)))


def test_check_names_kind_and_route():
    function, parameters, x = MODELS["tied"]
    report = mgs.check(mgs.FunctionalModel(function, parameters), x)
    assert {layer.parameter: layer.kind for layer in report.layers} == {
        "table": "lookup+outer",
        "gain": "scale",
        "divisor": "sum",
        "b": "sum",
    }
    assert report.ok
    assert "lookup+outer" in str(report)
    function, parameters, x = MODELS["derived"]
    routes = {layer.parameter: layer.route for layer in mgs.check(mgs.FunctionalModel(function, parameters), x).layers}
    assert routes == {"v": "rows", "a": "rows", "c": "rows", "w2": "statistics"}


@pytest.mark.parametrize("function", [lambda p, x: x @ p["w"] * p["gain"], lambda p, x: x @ (p["w"] * p["gain"])])
def test_half_precision_is_summed_in_single_precision(function):
    parameters, x = {"w": draw(5, 3), "gain": draw(3)}, draw(6, 5)
    wide = {key: value.astype(np.float32) for key, value in parameters.items()}
    half = {key: value.astype(np.float16) for key, value in parameters.items()}
    low = mgs.kernel(mgs.FunctionalModel(lambda p, x: 300.0 * function(p, x), half), x.astype(np.float16))
    exact = mgs.kernel(mgs.FunctionalModel(lambda p, x: 300.0 * function(p, x), wide), x.astype(np.float32))
    assert low.dtype == np.float32
    assert exact.max() > np.finfo(np.float16).max
    np.testing.assert_allclose(low, exact, rtol=0, atol=0.02 * exact.max())


FOREIGN = "`model` must be written with autograd.numpy .* convert the parameters"
INPUTS = draw(4, 3)
GOOD = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": draw(3, 2)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mgs.kernel(GOOD, INPUTS[:0]), "`inputs` must hold at least one sample; got 0"),
        (lambda: mgs.kernel(GOOD, INPUTS, np.zeros(3, int)), "same number of samples"),
        (lambda: mgs.kernel(GOOD, 3.0), "`inputs` must be an array; got float"),
        (lambda: mgs.kernel(GOOD, np.float64(3.0)), "samples along its first axis"),
        (lambda: mgs.kernel(GOOD, np.full((4, 3), np.nan)), "`inputs` must be finite"),
        (lambda: mgs.kernel(GOOD, np.full((4, 3), "a")), "`inputs` must hold real numbers"),
        (lambda: mgs.kernel(GOOD, INPUTS, output="nonsense"), "`output` must be one of trace, full"),
        (lambda: mgs.kernel(GOOD, INPUTS, transform="nonsense"), "`transform` must be one of identity"),
        (lambda: mgs.kernel(GOOD, INPUTS, output="loss"), '`targets` must be given for output="loss"'),
        (lambda: mgs.kernel(GOOD, INPUTS, output="target"), '`targets` must be given for output="target"'),
        (lambda: mgs.kernel(GOOD, INPUTS, np.array([0, 1, 2, 0]), output="target"), "`targets` must be labels in 0..1; got 0..2"),
        (lambda: mgs.kernel(GOOD, INPUTS, np.zeros((4, 3)), output="loss"), r"`targets` must have shape \(4,\) .* got \(4, 3\)"),
        (lambda: mgs.kernel(GOOD, INPUTS, np.zeros(4), output="loss"), "`targets` must be integers"),
        (lambda: mgs.kernel(GOOD, INPUTS, output="random", probes=0), "`probes` must be an integer"),
        (lambda: mgs.kernel(GOOD, INPUTS, chunk_size=0), "`chunk_size` must be an integer"),
        (lambda: mgs.kernel(GOOD, INPUTS, parameters=["v"]), r"`parameters` must name parameters of the model; got \['v'\]"),
        (lambda: mgs.kernel(GOOD, INPUTS, parameters=lambda name: False), "`parameters` must pick at least one"),
        (lambda: mgs.kernel(GOOD, INPUTS, np.zeros(4, int), output=lambda o, t: o), "`output` must return one value"),
        (lambda: mgs.kernel(GOOD, INPUTS, np.zeros(4, int), output="loss", loss="mse"), "`loss` must be a function .* got 'mse'"),
        (lambda: mgs.kernel(GOOD, INPUTS, parameters=3), "`parameters` must be names or a function of one; got 3"),
        (lambda: mgs.kernel(GOOD, INPUTS, parameters=[INPUTS]), "`parameters` must be names or a function of one"),
        (
            lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: 1j * x @ p["w"], GOOD.parameters), INPUTS),
            "must return real outputs",
        ),
        (lambda: mgs.kernel(object(), INPUTS), "`model` must be a FunctionalModel or a model"),
        (lambda: mgs.kernel(np.zeros(3), INPUTS), "`model` must be a FunctionalModel for the NumPy backend"),
        (lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: x, {"w": np.arange(3)}), INPUTS), "`parameters` must be floating"),
        (lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: x, {}), INPUTS), "`parameters` must hold at least one array"),
        (
            lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: x, {"w": 0.5}), INPUTS),
            "`parameters` must hold arrays; got the number",
        ),
        (lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: x[:, 0] * p["w"], {"w": draw(1)}), INPUTS), "outputs of shape"),
        (lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: (x, x[0]), {"w": draw(1)}), INPUTS), "`model` must .*got tuple"),
        (lambda: mgs.kernel(GOOD, INPUTS, output=lambda o, t: (o, t)), "`output` must return one value .*got tuple"),
        (lambda: mgs.FunctionalModel(3, {}), "`function` must be callable"),
        (lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: np.dot(x, p["w"]), GOOD.parameters), INPUTS), FOREIGN),
        (lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: np.dot(x, p["w"]) @ p["w"].T, GOOD.parameters), INPUTS), FOREIGN),
        *(
            (lambda change=change: mgs.kernel(GOOD, INPUTS, transform=change), "`transform` must be written with autograd.numpy")
            for change in (np.asarray, lambda o: np.where(o > 0, o, 0.0), lambda o: np.einsum("nc,cd->nd", o, np.eye(2)))
        ),
        (
            lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: np.linalg.det(p["w"].T @ p["w"]), GOOD.parameters), INPUTS),
            FOREIGN,
        ),
    ],
)
@pytest.mark.wrong_types
def test_bad_arguments_are_named(call, message):
    with pytest.raises(mgs.ArgumentError, match=message):
        call()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "bool", "int64"])
@pytest.mark.parametrize("function", [lambda p, x: anp.tanh(x @ p["w"]), lambda p, x: x * p["scale"]], ids=["outer", "scale"])
def test_integers_count_as_the_numbers_that_they_are(dtype, function):
    inputs = np.random.default_rng(0).integers(0, 120, size=(6, 40)).astype(dtype)
    model = mgs.FunctionalModel(function, {"w": 0.01 * draw(40, 3), "scale": draw(40)})
    np.testing.assert_allclose(mgs.kernel(model, inputs), mgs.kernel(model, inputs.astype(float)))


def test_what_fails_for_one_sample_is_told_with_its_cause():
    model = mgs.FunctionalModel(lambda p, x: anp.einsum("ni,ic->nc", x, p["w"]) ** 3, {"w": draw(3, 1)})
    with pytest.raises(mgs.SamplesInteractError, match=r"take one alone; got the error `loss` must return one value"):
        mgs.kernel(model, INPUTS, np.zeros((4, 1)), output="loss", loss=lambda o, t: anp.squeeze((o - t) ** 2))


def test_the_blocks_of_two_precisions_are_of_the_finer():
    left = [Rows("w", draw(2, 1, 3).astype(np.float32))]
    right = [Scale("w", draw(2, 1, 1, 3), inputs=np.ones((2, 1, 3)))]
    assert contract(left, right).dtype == np.float64
