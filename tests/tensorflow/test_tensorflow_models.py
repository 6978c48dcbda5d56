"""Models as TensorFlow users hold them: modules, traced functions, replicas, XLA, half precision; and refusals."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow as tf
from mgs_core.backends.tensorflow import probe
from mgs_oracles import close, slope

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(6, 4))
IDS = RANDOM.integers(0, 5, (6, 3))


def variable(*shape: int, name: str = "w") -> tf.Variable:
    return tf.Variable(RANDOM.normal(size=shape), name=name)


def expected(function, variables, x) -> np.ndarray:
    """A loop of ordinary gradients."""
    rows = []
    for a in range(len(x)):
        with tf.GradientTape(persistent=True) as tape:
            outputs = tf.unstack(function(tf.constant(x[a : a + 1]))[0])
        each = [tape.gradient(output, variables, unconnected_gradients="zero") for output in outputs]
        rows.append([np.concatenate([np.ravel(tf.convert_to_tensor(g)) for g in found]) for found in each])
    return np.einsum("acp,bcp->ab", rows, rows)


class Inner(tf.Module):
    def __init__(self):
        super().__init__()
        self.w, self.calls = variable(3, 3), tf.Variable(0, trainable=False)

    @tf.function
    def __call__(self, h):
        self.calls.assign_add(1)
        if tf.reduce_sum(h) > 1e9:  # a branch of the graph
            h = h * 0.0
        return tf.tanh(h @ self.w)


class Module(tf.Module):
    """Reads variables by itself, twice, within a tf.function within another, and by lookup."""

    def __init__(self):
        super().__init__()
        self.table, self.w, self.b, self.inner = variable(5, 4), variable(4, 3), variable(3), Inner()

    @tf.function
    def __call__(self, ids):
        h = tf.reduce_mean(tf.nn.embedding_lookup(self.table, ids), axis=1) if ids.dtype.is_integer else ids
        return self.inner(self.inner(h @ self.w + self.b)) + h @ self.w


@pytest.mark.parametrize("x", [X, IDS], ids=["dense", "lookup"])
def test_module_that_reads_its_variables(x):
    module = Module()
    module(tf.constant(x))
    before, calls = [v.numpy() for v in module.trainable_variables], int(module.inner.calls)
    kernel = mgs.kernel(module, x)
    assert int(module.inner.calls) == calls  # assignments are not repeated
    for now, then in zip(module.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(now, then)
    close(kernel, expected(module, module.trainable_variables, x))
    report = mgs.check(module, x)
    assert {layer.route for layer in report.layers if layer.kind != "unused"} == {"statistics"}
    assert [layer.parameter for layer in report.layers] == ["w", "w#2", "w#3", "w#4"]


def test_a_kernel_within_a_traced_function_brings_no_warning(tmp_path):
    program = """
        import tensorflow as tf, mgs_core as mgs
        w, penalty = tf.Variable(tf.ones((4, 3))), mgs.Penalty("trace", 0.1)

        def value(x):
            model = mgs.FunctionalModel(lambda p, x: tf.tanh(x @ p["w"]), {"w": w})
            return penalty(mgs.kernel(model, x, x, output=lambda f, t: f[:, 0] - t[:, 0]))

        print(tf.function(value)(tf.ones((5, 4))))
    """
    file = tmp_path / "program.py"  # AutoGraph reads the source
    file.write_text(textwrap.dedent(program))
    found = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True)
    assert "tf.Tensor" in found.stdout
    assert "AutoGraph" not in found.stderr


def test_traced_function_and_its_variables():
    w, b = variable(4, 3), variable(3)
    function = tf.function(lambda x: tf.tanh(x @ w + b))
    model = mgs.FunctionalModel(lambda _, x: function(x), {"w": w, "b": b})
    close(mgs.kernel(model, X), expected(function, [w, b], X))
    given = mgs.FunctionalModel(
        tf.function(lambda p, x: tf.tanh(x @ p["w"] + p["b"])), {"w": w.read_value(), "b": b.read_value()}
    )
    close(mgs.kernel(given, X), expected(function, [w, b], X))
    assert mgs.check(given, X).layers[0].route == "statistics"


def penalised(module, x):
    return mgs.Penalty("log_determinant", strength=1.0)(mgs.kernel(module, x, differentiable=True))


@pytest.mark.parametrize("mode", ["eager", "traced", "xla"])
def test_penalty_of_a_module_on_a_tape(mode):
    module, x = Module(), tf.constant(X)
    variables = module.trainable_variables

    def step():
        with tf.GradientTape() as tape:
            value = penalised(module, x)
        return value, tape.gradient(value, variables, unconnected_gradients="zero")

    _, found = (step if mode == "eager" else tf.function(step, jit_compile=mode == "xla"))()
    directions, start = [RANDOM.normal(size=v.shape) for v in variables], [v.numpy() for v in variables]
    traced = tf.function(lambda: penalised(module, x))

    def at(t):
        for v, s, d in zip(variables, start, directions, strict=True):
            v.assign(s + t * d)
        return traced()

    along = sum(np.sum(tf.convert_to_tensor(g) * d) for g, d in zip(found, directions, strict=True))
    assert along == pytest.approx(slope(at), rel=1e-6)


def scanned(p, x):
    """Scan over positions, for which rows are formed."""
    steps = tf.scan(
        lambda h, row: tf.tanh(h @ p["u"] + row @ p["v"]), tf.transpose(x, (1, 0, 2)), tf.zeros((x.shape[0], 3), x.dtype)
    )
    return steps[-1] @ p["w"]


def attention(p, x):
    h = x @ p["v"]
    return tf.reduce_mean(tf.nn.softmax(h @ tf.transpose(h, (0, 2, 1))) @ h, axis=1) @ p["w"]


def low_rank(p, x):
    """Compute a weight, for which rows are formed, and broadcast it."""
    h = tf.tanh(x @ (p["v"] @ p["u"]))
    return tf.reduce_mean(tf.transpose(h, (0, 2, 1)) @ x @ p["v"], axis=1) @ p["w"]


@pytest.mark.parametrize("function", [scanned, attention, low_rank])
def test_xla_compiles_a_penalised_step_once_for_all_batches(function):
    """What must be known to compile would be no parameter of the program. The gradient is that of the step without XLA."""
    shapes = {"v": (4, 3), "w": (3, 2)} | ({} if function is attention else {"u": (3, 3)})
    parameters = {name: tf.constant(RANDOM.normal(size=shape)) for name, shape in shapes.items()}

    def step(parameters, x):
        return mgs.get_backend("tensorflow").value_and_gradient(
            lambda p: mgs.Penalty("log_determinant")(mgs.kernel(mgs.FunctionalModel(function, p), x, differentiable=True))
        )(parameters)

    x = tf.constant(RANDOM.normal(size=(5, 2, 4)))
    compiled = tf.function(step, jit_compile=True)
    text = compiled.experimental_get_compiler_ir(parameters, x)(stage="hlo")
    entry = text[text.index("ENTRY") :]
    for array in (*parameters.values(), x):
        assert re.search(rf"= f64\[{','.join(map(str, array.shape))}\]\S* parameter\(", entry)
    for found, expected in zip(compiled(parameters, x)[1].values(), step(parameters, x)[1].values(), strict=True):
        close(found, expected)


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_a_traced_penalty_moves_with_all_that_it_holds(place):
    """Parameters, inputs, soft targets, a tensor and a variable that the model holds; as eagerly, wherever the tape is."""
    w, targets, held = (tf.constant(RANDOM.normal(size=shape)) for shape in ((4, 3), (6, 3), (4,)))
    free, x = variable(3), tf.constant(X)

    def penalty(w, x, targets, held):
        model = mgs.FunctionalModel(lambda p, x: tf.tanh((x * held) @ p["w"]) * free, {"w": w})
        kernel = mgs.kernel(
            model, x, targets, output="loss", loss=lambda f, y: tf.reduce_sum((f - y) ** 2, -1), differentiable=True
        )
        return mgs.Penalty("log_determinant")(kernel)

    def gradients(function):
        given = (w, x, targets, held)
        with tf.GradientTape() as tape:
            tape.watch(given)
            value = function(*given)
        return tape.gradient(value, [*given, free])

    found = tf.function(lambda: gradients(penalty))() if place == "inside" else gradients(tf.function(penalty))
    for a, b in zip(found, gradients(penalty), strict=True):
        close(a, b)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_penalty_in_a_branch_moves_with_all_that_it_holds(nested, compiled):
    w, free, x, targets = variable(4, 3), variable(3), tf.constant(RANDOM.normal(size=(600, 4))), tf.constant([0, 1, 2] * 200)
    model = mgs.FunctionalModel(lambda p, x: tf.tanh(x @ p["w"]) * free, {"w": w})

    def penalty():
        return mgs.Penalty("log_determinant")(mgs.kernel(model, x, targets, output="target", differentiable=True))

    def step(number):
        with tf.GradientTape() as tape:
            value = tf.cond(number > 0, inner if nested else penalty, lambda: tf.zeros((), tf.float64))
        return tape.gradient(value, [w, free], unconnected_gradients="zero")

    def inner():
        return tf.cond(tf.reduce_sum(x) < 1e9, penalty, lambda: tf.zeros((), tf.float64))

    traced = tf.function(step, jit_compile=compiled)
    for a, b in zip(traced(tf.constant(1)), step(tf.constant(1)), strict=True):
        close(a, b)
    assert not any(np.any(part) for part in traced(tf.constant(0)))


def test_a_penalty_in_a_loop_moves_with_all_that_it_holds():
    w, free, x = variable(4, 3), variable(3), tf.constant(RANDOM.normal(size=(600, 4)))
    model = mgs.FunctionalModel(lambda p, x: tf.tanh(x @ p["w"]) * free, {"w": w})

    def step():
        with tf.GradientTape() as tape:
            value = tf.zeros((), tf.float64)
            for number in tf.range(2):
                part = x[300 * number : 300 * (number + 1)]
                kernel = mgs.kernel(model, tf.ensure_shape(part, (300, 4)), output="trace", differentiable=True)
                value += mgs.Penalty("log_determinant")(kernel)
        return tape.gradient(value, [w, free])

    for a, b in zip(tf.function(step)(), step(), strict=True):
        close(a, b)


@pytest.mark.parametrize("function", [scanned, tf.function(lambda p, x: scanned(p, x))])
def test_a_model_with_loops_is_known_again(function, monkeypatch):
    """The functions of its loops and calls have new names in each trace."""
    found, find = [], probe._find
    monkeypatch.setattr(probe, "_find", lambda *given: found.append(given) or find(*given))
    parameters = {name: tf.constant(RANDOM.normal(size=shape)) for name, shape in {"v": (4, 3), "u": (3, 3), "w": (3, 2)}.items()}
    x, kernels = tf.constant(RANDOM.normal(size=(5, 2, 4))), []
    for _ in range(3):
        kernels.append(tf.function(lambda p, x: mgs.kernel(mgs.FunctionalModel(function, p), x))(parameters, x))
        assert len(found) == 1
    close(kernels[2], mgs.kernel(mgs.FunctionalModel(function, parameters), x))


def test_loops_that_differ_are_not_taken_for_one_another():
    shapes, x = {"u": (3, 3), "w": (3, 2)}, tf.constant(RANDOM.normal(size=(5, 3)))
    parameters = {name: tf.constant(RANDOM.normal(size=shape)) for name, shape in shapes.items()}

    def kernel(axis):
        def step(i, h):
            return i + 1, tf.tanh(h @ parameters_of["u"]) - tf.reduce_mean(h, axis=axis, keepdims=True)

        def function(p, x):
            parameters_of.update(p)
            return tf.while_loop(lambda i, h: i < 2, step, [0, x], maximum_iterations=2)[1] @ p["w"]

        parameters_of = {}
        return tf.function(lambda p, x: mgs.kernel(mgs.FunctionalModel(function, p), x))

    kernel(axis=1)(parameters, x)
    with pytest.raises(mgs.SamplesInteractError):
        kernel(axis=0)(parameters, x)


def test_attention_over_tokens_needs_no_rows_where_there_are_no_values():
    shapes = {"table": (5, 4), "q": (4, 4), "k": (4, 4), "w": (4, 2)}
    parameters = {name: tf.constant(RANDOM.normal(size=shape)) for name, shape in shapes.items()}

    def model(p, x):
        h = tf.gather(p["table"], x)
        return tf.reduce_mean(tf.nn.softmax((h @ p["q"]) @ tf.transpose(h @ p["k"], (0, 2, 1))) @ h, axis=1) @ p["w"]

    @tf.function
    def kernel(p, x):
        return mgs.kernel(mgs.FunctionalModel(model, p), x)

    traced = kernel.get_concrete_function(parameters, tf.constant(IDS)).graph.as_graph_def()
    operations = {node.op for nodes in (traced.node, *(f.node_def for f in traced.library.function)) for node in nodes}
    assert "BatchMatMulV2" in operations
    assert not {"While", "StatelessWhile"} & operations
    close(kernel(parameters, tf.constant(IDS)), mgs.kernel(mgs.FunctionalModel(model, parameters), tf.constant(IDS)))


def test_a_penalty_of_random_outputs_is_differentiated_as_it_was_drawn():
    weights = {"v": tf.constant(RANDOM.normal(size=(4, 8))), "w": tf.constant(RANDOM.normal(size=(8, 2)))}

    @tf.function
    def step(weights):
        def trace(p):
            model = mgs.FunctionalModel(lambda p, x: tf.nn.dropout(x @ p["v"], 0.5) @ p["w"], p)
            return tf.linalg.trace(mgs.kernel(model, tf.constant(X), differentiable=True))

        return mgs.get_backend("tensorflow").value_and_gradient(trace)(weights)

    value, gradient = step(weights)  # a sum of squares of v and w, each times what was drawn
    assert float(sum(tf.reduce_sum(gradient[name] * weights[name]) for name in weights)) == pytest.approx(2.0 * float(value))


def test_a_traced_function_that_has_been_trained():
    w, v = variable(4, 3), variable(3, 2)
    function = tf.function(lambda x: tf.tanh(x @ w) @ v, input_signature=[tf.TensorSpec((None, 4), tf.float64)])
    model = mgs.FunctionalModel(lambda _, x: function(x), {"w": w, "v": v})
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(function(tf.constant(X)))
    tape.gradient(loss, [w, v])
    close(mgs.kernel(model, X), expected(lambda x: tf.tanh(x @ w) @ v, [w, v], X))


@pytest.mark.parametrize(
    "rearranged",
    [
        lambda h: tf.sort(h, axis=1),
        lambda h: tf.sort(h, axis=-2, direction="DESCENDING"),
        lambda h: tf.transpose(h, tf.constant([0, 2, 1], tf.int64)),
    ],
    ids=["sort", "sort from the end", "transpose"],
)
def test_axes_of_any_integer_type(rearranged):
    w, x = variable(3, 3), RANDOM.normal(size=(5, 3, 3))
    model = mgs.FunctionalModel(lambda p, x: rearranged(x @ p["w"])[:, 0], {"w": w})
    close(mgs.kernel(model, x), expected(lambda x: rearranged(x @ w)[:, 0], [w], x))
    close(tf.function(lambda x: mgs.kernel(model, x))(x), mgs.kernel(model, x))


SEGMENTED = {
    "bincount": lambda p, x: tf.math.bincount(x, minlength=6, maxlength=6, axis=-1, dtype=tf.float64) @ p["w"],
    "segments": lambda p, x: tf.math.segment_sum(
        tf.reshape(tf.gather(p["w"], x), (-1, 2)), tf.repeat(tf.range(tf.shape(x)[0]), tf.shape(x)[1])
    ),
    "mask": lambda p, x: tf.boolean_mask(tf.reduce_mean(tf.gather(p["w"], x), 1), tf.reduce_all(x >= 0, 1)),
    "sparse": lambda p, x: tf.nn.embedding_lookup_sparse(p["w"], tf.sparse.from_dense(x + 1), None, combiner="sum"),
    "ragged": lambda p, x: tf.reduce_sum(
        tf.ragged.map_flat_values(lambda v: tf.gather(p["w"], v), tf.RaggedTensor.from_tensor(x, padding=0)).to_tensor(), 1
    ),
    "table": lambda p, x: tf.gather(p["w"], TABLE.lookup(x[:, 0])),
    "python": lambda p, x: ensured(tf.py_function(lambda v: 2.0 * tf.cast(v, tf.float64), [x], tf.float64), x) @ p["v"],
}
TABLE = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(np.arange(5), [1, 0, 3, 2, 4]), 0)


def ensured(tensor, like):
    tensor.set_shape(like.shape)
    return tensor


@pytest.mark.parametrize("name", SEGMENTED)
@pytest.mark.parametrize("traced", [False, True])
def test_a_number_of_samples_that_is_not_known_when_traced(name, traced):
    values = {"w": variable(6, 2), "v": variable(3, 2)}
    model = mgs.FunctionalModel(SEGMENTED[name], values)
    kernel = tf.function(lambda x: mgs.kernel(model, x)) if traced else lambda x: mgs.kernel(model, x)
    ids = tf.constant(IDS)
    close(kernel(ids), expected(lambda x: tf.reshape(model(x), (-1, 2)), list(values.values()), ids))


def test_variables_are_read_at_indices():
    table, out, pairs = variable(9, 4), variable(4, 2), tf.constant(IDS)[:, :, None]

    def model(x):
        return tf.reduce_mean(tf.gather_nd(table, x), axis=1) @ out

    found = mgs.kernel(mgs.FunctionalModel(lambda _, x: model(x), {"table": table, "out": out}), pairs)
    close(found, expected(model, [table, out], pairs))


@pytest.mark.parametrize("n", [6, 1])
def test_a_factor_moves_with_its_parameter(n):
    """Into another shape, to which it would align otherwise; group normalisation of one sample has such a factor of its data."""
    w, gain = variable(4, 4), variable(4)
    factor = tf.constant([[1.0], [2.0], [3.0], [4.0]], tf.float64)

    def model(x):
        size = tf.reshape(tf.norm(tf.reshape(x, (-1, 2, 2)), axis=-1, keepdims=True), (-1, 2, 1))
        h = tf.reshape(size * tf.reshape(gain, (1, 2, 2)), (-1, 4)) + x
        return tf.reshape(tf.tanh(tf.expand_dims(w * factor, -1) + h[:, None, :, None]), (-1, 16))

    found = mgs.kernel(mgs.FunctionalModel(lambda _, x: model(x), {"w": w, "gain": gain}), X[:n])
    close(found, expected(model, [w, gain], X[:n]))


def test_a_model_may_hold_tensors_of_the_graph_that_is_traced():
    w, scale = variable(4, 3), tf.constant(RANDOM.normal(size=3))

    @tf.function
    def found(x, scale):
        return mgs.kernel(mgs.FunctionalModel(lambda p, x: tf.tanh(x @ p["w"] * scale), {"w": w}), x)

    close(found(tf.constant(X), scale), expected(lambda x: tf.tanh(x @ w * scale), [w], X))


def test_a_loss_in_single_precision_of_a_model_in_double():
    w = variable(4, 3)

    def loss(outputs, targets):
        return tf.reduce_sum(tf.cast(outputs, tf.float32) ** 2, axis=-1)

    kernel = mgs.kernel(mgs.FunctionalModel(lambda p, x: tf.tanh(x @ p["w"]), {"w": w}), X, X, output="loss", loss=loss)
    close(kernel, expected(lambda x: tf.reduce_sum(tf.tanh(x @ w) ** 2, axis=-1, keepdims=True), [w], X), 1e-5)


def test_half_precision_contracts_in_single():
    w = tf.constant(RANDOM.normal(size=(4, 3)), tf.float32)

    def function(p, x):
        return tf.cast(tf.cast(x, tf.bfloat16) @ tf.cast(p["w"], tf.bfloat16), tf.float32)

    kernel = mgs.kernel(mgs.FunctionalModel(function, {"w": w}), X.astype(np.float32))
    assert kernel.dtype == tf.float32
    close(kernel, 3 * X @ X.T, 0.02)


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_models_in_half_precision_have_kernels_in_single(dtype):
    def function(p, x):  # the factor reaches the data through an operation, so that it has rows
        return x @ p["w"] * tf.reduce_sum(p["factor"] ** 2)

    parameters = {"w": tf.constant(RANDOM.normal(size=(4, 3)), dtype), "factor": tf.constant([0.5, 0.5], dtype)}
    kernel = mgs.kernel(mgs.FunctionalModel(function, parameters), tf.cast(X, dtype))
    assert kernel.dtype == tf.float32
    exact = {name: tf.cast(value, tf.float64) for name, value in parameters.items()}
    close(kernel, mgs.kernel(mgs.FunctionalModel(function, exact), tf.cast(tf.cast(X, dtype), tf.float64)), 0.02)


def test_replicas_get_a_kernel_each():
    if len(tf.config.list_logical_devices("CPU")) < 2:
        pytest.skip("TensorFlow was started with one device")
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        w = variable(4, 3)
    model = mgs.FunctionalModel(lambda _, x: tf.tanh(x @ w), {"w": w})
    kernels = tf.function(lambda: strategy.run(lambda: mgs.kernel(model, tf.constant(X))))()
    for kernel in strategy.experimental_local_results(kernels):
        close(kernel, expected(lambda x: tf.tanh(x @ w), [w], X))


def test_batch_statistics_are_refused():
    w = tf.constant(RANDOM.normal(size=(4, 3)))

    def function(p, x):
        h = x @ p["w"]
        return tf.tanh((h - tf.reduce_mean(h, 0)) / tf.math.reduce_std(h, 0)) @ p["v"]

    model = mgs.FunctionalModel(function, {"w": w, "v": tf.transpose(w)})
    for call in (mgs.kernel, mgs.get_backend("tensorflow").compile(lambda m, x: mgs.kernel(model, x))):
        with pytest.raises(mgs.SamplesInteractError, match="samples that interact in front of parameter 'w'"):
            call(model, tf.constant(X)) if call is mgs.kernel else call(0, tf.constant(X))
    assert mgs.kernel(model, X, parameters="v").shape == (6, 6)
    assert not mgs.check(model, X).ok


def test_random_state_and_arguments_stay():
    tf.random.set_seed(3)
    first = tf.random.uniform(())
    tf.random.set_seed(3)
    w = tf.constant(RANDOM.normal(size=(4, 3)))
    mgs.kernel(mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": w}), X)
    assert float(tf.random.uniform(())) == float(first)


def loop_reading(w):
    return lambda _, x: tf.while_loop(lambda i, h: i < 2, lambda i, h: (i + 1, tf.tanh(h @ w)), (0, x), maximum_iterations=2)[1]


SQUARE = variable(4, 4)
GOOD = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": tf.ones((4, 3), tf.float64)})
LOOP = mgs.FunctionalModel(loop_reading(SQUARE), {"w": SQUARE})
SWISH = mgs.FunctionalModel(lambda _, x: tf.nn.silu(x @ SQUARE), {"w": SQUARE})
WITHIN = tf.function(lambda x: x @ tf.linalg.expm(0.1 * SQUARE), input_signature=[tf.TensorSpec((None, 4), tf.float64)])
EXPONENTIAL = mgs.FunctionalModel(lambda _, x: WITHIN(x), {"w": SQUARE})  # in which there are loops
HANDLE = mgs.FunctionalModel(
    lambda _, x: tf.where(tf.raw_ops.VarIsInitializedOp(resource=SQUARE.handle), x @ SQUARE, x), {"w": SQUARE}
)


@pytest.mark.parametrize("model", [LOOP, SWISH, EXPONENTIAL], ids=["loop", "swish", "exponential"])
def test_variables_are_read_in_loops_and_in_front_of_gradients_of_their_own(model):
    close(mgs.kernel(model, X), expected(lambda x: model(x), [SQUARE], X), 1e-11)


@tf.custom_gradient
def of_six(h):
    def gradient(upstream):
        with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(upstream)[0], 6)]):
            return tf.identity(upstream)

    return tf.identity(h), gradient


def with_labels(labels, output, traced=False):
    if not traced:
        return lambda: mgs.kernel(GOOD, X, labels, output=output)
    return lambda: tf.function(lambda x, y: mgs.kernel(GOOD, x, y, output=output))(tf.constant(X), tf.constant(labels))


@pytest.mark.parametrize("output", ["loss", "target"])
def test_traced_labels_are_looked_at(output):
    labels = [0, 1, 2, 2, 1, 0]
    np.testing.assert_allclose(with_labels(labels, output, traced=True)(), with_labels(np.array(labels), output)(), rtol=1e-12)


@pytest.mark.parametrize("output", ["target", "loss"])
def test_soft_targets_without_values_may_be_drawn(output):  # as ones, which are no probabilities
    model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": tf.constant(RANDOM.normal(size=(4, 3)))})
    soft = tf.constant(RANDOM.dirichlet(np.ones(3), 6))
    traced = tf.function(lambda x, y: mgs.kernel(model, x, y, output=output))
    close(traced(tf.constant(X), soft), mgs.kernel(model, tf.constant(X), soft, output=output))


def kernel_of_function(function, parameters):
    return lambda: mgs.kernel(mgs.FunctionalModel(function, parameters), X)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mgs.kernel(GOOD, np.full((6, 4), np.nan)), mgs.ArgumentError, "`inputs` must be finite"),
        (kernel_of_function(lambda p, x: x, {"w": tf.range(3)}), mgs.ArgumentError, "`parameters` must be floating"),
        (kernel_of_function(lambda p, x: x[0] * p["w"], {"w": SQUARE}), mgs.ArgumentError, "outputs of shape"),
        *(
            (
                kernel_of_function(function, {"w": tf.Variable(SQUARE)}),
                mgs.ArgumentError,
                f"`model` must .* one tensor.*got {got}",
            )
            for function, got in (
                (lambda p, x: (x @ p["w"], x), "tuple"),
                (lambda p, x: np.ones((6, 2)), "ndarray"),
                (lambda p, x: None, "NoneType"),
                (lambda p, x: tf.cast(x @ p["w"], tf.int32), "a tensor of int32"),
                (lambda p, x: tf.complex(x @ p["w"], x), "a tensor of complex"),
            )
        ),
        (lambda: mgs.kernel(GOOD, X, output=lambda o, _: np.ones(len(X))), mgs.ArgumentError, "`output` must .*got ndarray"),
        (
            lambda: mgs.kernel(
                GOOD, X, output=lambda o, _: tf.nn.sparse_softmax_cross_entropy_with_logits(tf.fill([o.shape[0]], 9), o)
            ),
            tf.errors.InvalidArgumentError,
            "label",
        ),
        *(
            (with_labels(np.array(labels), output), mgs.ArgumentError, message)
            for output in ("loss", "target")
            for labels, message in (
                ([0, 1, 2, 3, 1, 0], r"`targets` must be labels in 0\.\.2; got 0\.\.3"),
                ([0, 1, 2, -1, 1, 0], r"`targets` must be labels in 0\.\.2; got -1\.\.2"),
                ([0.0, 0.5, 1.0, 1.0, 1.0, 0.0], "`targets` must be integers to be labels; got dtype float64"),
            )
        ),
        *(
            (
                with_labels([0, 1, 2, 3, 1, 0], output, traced=True),
                tf.errors.InvalidArgumentError,
                r"`targets` must be labels in 0\.\.2; got least and most\] \[0\] \[3\]",
            )
            for output in ("loss", "target")
        ),
        (lambda: mgs.kernel(GOOD, tf.ragged.constant([[1.0], [1.0, 2.0]])), mgs.ArgumentError, r"got a RaggedTensor.*to_tensor"),
        (lambda: mgs.kernel(GOOD, tf.sparse.eye(4)), mgs.ArgumentError, r"got a SparseTensor. Pass tf.sparse.to_dense"),
        (
            lambda: mgs.kernel(GOOD, tf.sparse.eye(4), chunk_size=2),
            mgs.ArgumentError,
            "`chunk_size` must be None for inputs that",
        ),
        (
            lambda: mgs.kernel(GOOD, tf.ragged.constant([[1.0], [1.0, 2.0]]), chunk_size=1),
            mgs.ArgumentError,
            "got a RaggedTensor",
        ),
        (lambda: mgs.kernel(tf.Module(), X), mgs.ArgumentError, "`model` must be a FunctionalModel or a tf.Module that can be"),
        (
            lambda: mgs.kernel(GOOD, (X, tf.constant(2.0))),
            mgs.ArgumentError,
            r"`inputs\[1\]` must have samples along its first axis; got a scalar",
        ),
        (
            kernel_of_function(lambda p, x: (x @ p["w"]) @ tf.transpose(x @ p["w"]), {"w": tf.Variable(SQUARE)}),
            mgs.SamplesInteractError,
            "treat each sample by itself",
        ),
        (
            kernel_of_function(lambda p, x: x @ p["w"], {"w": tf.Variable(SQUARE, shape=(4, None))}),
            mgs.ArgumentError,
            r"`parameters` must have known shapes; got \(4, None\) for 'w'",
        ),
        (
            lambda: mgs.kernel(mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": np.ones((4, 3))}), tf.constant(X)),
            mgs.ArgumentError,
            "`inputs` must be NumPy arrays where the parameters are; got EagerTensor.*tf.Variable",
        ),
        (
            kernel_of_function(lambda p, x: tf.py_function(lambda h: h, [x], tf.float64), {"w": SQUARE}),
            mgs.ArgumentError,
            r"outputs of shape \(n, c\) with n = 6; got <unknown>.*tf.reshape",
        ),
        (
            kernel_of_function(lambda p, x: of_six(x @ tf.linalg.expm(p["w"])), {"w": tf.constant(np.eye(4))}),
            mgs.UnsupportedModelError,
            "must have gradients that TensorFlow takes of one.* for parameter 'w'. Write gradients of your own",
        ),
        (lambda: mgs.kernel(HANDLE, X), mgs.UnsupportedModelError, r"must read its variables as tensors.*VarIsInitialized"),
        (
            lambda: tf.function(lambda x: mgs.kernel(GOOD, x)).get_concrete_function(tf.TensorSpec((None, 4), tf.float64)),
            mgs.ArgumentError,
            "`inputs` must have a known number of samples; got None",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("autograph", [True, False])
def test_errors_within_a_traced_function_keep_their_class(autograph):
    for options, error in (({"parameters": "v"}, mgs.ArgumentError), ({}, mgs.UnsupportedModelError)):
        with pytest.raises(error):
            tf.function(lambda x, options=options: mgs.kernel(HANDLE, x, **options), autograph=autograph)(tf.constant(X))


def test_half_precision_within_a_model_in_single():
    """A normalisation in float32 of data that were rounded to bfloat16 is as exact as these."""
    draw = np.random.default_rng(0).normal

    def mixed(p, x):
        h = tf.cast(tf.cast(x, tf.bfloat16) @ tf.cast(p["w"], tf.bfloat16), tf.float32) * p["gain"] + p["shift"]
        return tf.cast(tf.cast(tf.tanh(h), tf.bfloat16) @ tf.cast(p["v"], tf.bfloat16), tf.float32)

    shapes = {"w": (16, 12), "gain": (12,), "shift": (12,), "v": (12, 3)}
    p = {name: tf.constant(0.5 * draw(size=shape), tf.float32) for name, shape in shapes.items()}
    x = tf.constant(draw(size=(32, 16)), tf.float32)
    single = mgs.FunctionalModel(lambda p, x: tf.tanh((x @ p["w"]) * p["gain"] + p["shift"]) @ p["v"], p)
    found, expected = (mgs.kernel(model, x, output="sum") for model in (mgs.FunctionalModel(mixed, p), single))
    np.testing.assert_allclose(found, expected, atol=0.03 * float(tf.reduce_max(expected)))


def test_python_behind_a_parameter_is_refused_and_before_one_is_data():
    def of_python(x):
        return tf.ensure_shape(tf.py_function(lambda value: 2.0 * value, [x], tf.float64), x.shape)

    weights = {"w": tf.ones((4, 3), tf.float64)}
    np.testing.assert_allclose(mgs.kernel(mgs.FunctionalModel(lambda p, x: of_python(x) @ p["w"], weights), X), 12 * X @ X.T)
    with pytest.raises(mgs.UnsupportedModelError, match=r"`model` must have no tf.py_function behind a parameter"):
        mgs.kernel(mgs.FunctionalModel(lambda p, x: of_python(x @ p["w"]), weights), X)
