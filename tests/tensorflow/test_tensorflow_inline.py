"""Models that hide loops, branches and gradients of their own: exact, and what the user traced stays as it was."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tensorflow as tf
from mgs_oracles import close

import mgs_core as mgs

RANDOM = np.random.default_rng(0)
N, STEPS, WIDTH = 4, 3, 3
X = tf.constant(RANDOM.normal(size=(N, STEPS, WIDTH)))


@tf.custom_gradient
def scaled(h, w):
    """A gradient of its own, with what only it needs, and a gradient of its own in turn."""
    mask = tf.cast(h > 0, h.dtype)

    def gradient(upstream):
        return 0.5 * (upstream @ tf.transpose(w)) * tf.nn.silu(h) * mask, tf.transpose(h) @ upstream

    return h @ w, gradient


def by_override(h, name="MgsTestLeaky"):
    with tf.compat.v1.get_default_graph().gradient_override_map({"Relu": name}):
        return tf.nn.relu(h)


@tf.RegisterGradient("MgsTestLeaky")
def leaky(op, upstream):
    return upstream * tf.where(op.outputs[0] > 0, tf.ones_like(upstream), 0.3 * tf.cos(op.inputs[0]))


def recurrent(self, x):
    w, h = tf.convert_to_tensor(self.w), tf.zeros_like(x[:, 0])
    for t in tf.range(STEPS):
        h = tf.tanh(x[:, t] + h @ w)
    return h


def reading(self, x):
    h = tf.zeros_like(x[:, 0])
    for t in tf.range(STEPS):
        h = tf.tanh(x[:, t] @ self.v + h @ self.w)
    return h


def until(self, x):
    h = x[:, 0]
    while tf.reduce_sum(self.w) < 100.0 and tf.reduce_sum(h) < -1e6:
        h = h @ self.w
    return h @ self.v


def grown(self, x):
    h = x[:, :, 0]
    for _ in tf.range(2):
        tf.autograph.experimental.set_loop_options(shape_invariants=[(h, tf.TensorShape((None, None)))])
        h = tf.concat([h, tf.sin(h * self.w[0, 0])], 1)
    return tf.reduce_sum(h, 1, keepdims=True) * self.v[0]


def branches(self, x):
    h = x[:, 0] if tf.reduce_sum(self.w) > 1e6 else tf.sin(x[:, 1] @ self.w)
    return tf.switch_case(tf.constant(1), [lambda: h, lambda: h @ self.v, lambda: h @ self.w])


def mapped(self, x):
    return tf.map_fn(lambda row: tf.linalg.matvec(self.w, tf.nn.silu(row[0] * self.v[0])), x)


def scanned(self, x):
    return tf.scan(lambda h, row: tf.tanh(row + h @ self.w), tf.transpose(x, (1, 0, 2)), initializer=x[:, 0])[-1]


def within(self, x):
    h = x[:, 0]
    for t in tf.range(STEPS):
        h = self.inner(scaled(tf.nn.silu(h), self.w)) + x[:, t]
    return h


CONTENTS = {
    "recurrent": recurrent,
    "reading": reading,
    "until": until,
    "grown": grown,
    "branches": branches,
    "mapped": mapped,
    "scanned": scanned,
    "within": within,
    "silu": lambda self, x: tf.nn.silu(x[:, 0] @ self.w) @ self.v,
    "custom": lambda self, x: scaled(tf.tanh(x[:, 0] @ self.v), self.w),
    "override": lambda self, x: by_override(x[:, 0] @ self.w) @ self.v,
    "recomputed": lambda self, x: tf.recompute_grad(lambda h: tf.tanh(tf.tanh(h @ self.w) @ self.v))(x[:, 0]),
    "passed through": lambda self, x: tf.grad_pass_through(tf.round)(x[:, 0] @ self.w) @ self.v,
    "function": lambda self, x: self.inner(self.inner(x[:, 0]) @ self.v),
}
#: Of which TensorFlow itself takes no second derivative: of a custom gradient in a loop, too.
ONCE = ("recomputed", "within")


class Net(tf.Module):
    def __init__(self, content, signature=None):
        super().__init__()
        self.w, self.v = (tf.Variable(RANDOM.normal(size=(WIDTH, WIDTH))) for _ in range(2))
        self.call = tf.function(lambda x: content(self, x), input_signature=signature)

    def __call__(self, x):
        return self.call(x)

    @tf.function
    def inner(self, h):
        for _ in tf.range(2):
            h = tf.sin(h @ self.v)
        return h


def gradient(net):
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(net(X) ** 2)
    return [tf.convert_to_tensor(part) for part in tape.gradient(value, [net.w, net.v], unconnected_gradients="zero")]


def looped(net):
    """The kernel of gradients of one output of one sample each."""
    rows = []
    for a in range(N):
        with tf.GradientTape(persistent=True) as tape:
            outputs = tf.unstack(net(X[a : a + 1])[0])
        found = [tape.gradient(output, [net.w, net.v], unconnected_gradients="zero") for output in outputs]
        rows.append([tf.concat([tf.reshape(tf.convert_to_tensor(part), [-1]) for part in parts], 0) for parts in found])
    stacked = tf.stack(rows)
    return tf.einsum("acp,bcp->ab", stacked, stacked)


def penalised(net, kernel):
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(tf.sin(kernel(net)))
    return [tf.convert_to_tensor(part) for part in tape.gradient(value, [net.w, net.v], unconnected_gradients="zero")]


@pytest.mark.parametrize("name", CONTENTS)
def test_what_a_module_hides_is_exact_and_stays(name):
    net, fresh = (Net(CONTENTS[name]) for _ in range(2))
    for variable, value in zip(fresh.trainable_variables, net.trainable_variables, strict=True):
        variable.assign(value)
    before = gradient(fresh)
    expected = looped(fresh)
    close(mgs.kernel(net, X), expected)  # before a gradient of the user's, and after it
    for part, truth in zip(gradient(net), before, strict=True):
        close(part, truth)
    close(mgs.kernel(net, X), expected)
    for part, truth in zip(gradient(net), before, strict=True):
        close(part, truth)


@pytest.mark.parametrize("name", [name for name in CONTENTS if name not in ONCE])
def test_a_penalised_step_of_what_a_module_hides(name):
    net = Net(CONTENTS[name])
    # traced, TensorFlow takes no second derivative of a custom gradient; an override is for graphs
    tf.config.run_functions_eagerly(name != "override")
    try:
        truth = penalised(net, looped)
    finally:
        tf.config.run_functions_eagerly(False)

    @tf.function
    def step():
        parts = gradient(net)
        return penalised(net, lambda net: mgs.kernel(net, X, differentiable=True)), parts

    found, parts = step()
    for part, expected in zip(found, truth, strict=True):
        close(part, expected, 1e-9)
    for part, expected in zip(parts, gradient(net), strict=True):
        close(part, expected)


@pytest.mark.parametrize("name", ["recurrent", "within", "grown"])
def test_a_loop_with_sizes_that_are_not_known_when_traced(name):
    net = Net(CONTENTS[name], [tf.TensorSpec((None, None if name == "grown" else STEPS, WIDTH), tf.float64)])
    close(mgs.kernel(net, X), looped(net))


@pytest.mark.parametrize("name", ["silu", "custom", "mapped"])
def test_a_function_of_its_parameters(name):
    """Given as variables, and as tensors."""

    class Given:
        def __init__(self, parameters):
            self.w, self.v = parameters["w"], parameters["v"]

    net = Net(CONTENTS[name])
    variables = {"w": net.w, "v": net.v}
    for parameters in (variables, {key: tf.convert_to_tensor(value) for key, value in variables.items()}):
        close(mgs.kernel(mgs.FunctionalModel(lambda p, x: CONTENTS[name](Given(p), x), parameters), X), looped(net))


@pytest.mark.parametrize("name", ["recurrent", "silu"])
def test_a_saved_model(name, tmp_path):
    net = Net(CONTENTS[name], [tf.TensorSpec((None, STEPS, WIDTH), tf.float64)])
    expected = looped(net)
    for kept in (True, False):
        tf.saved_model.save(net, tmp_path, options=tf.saved_model.SaveOptions(experimental_custom_gradients=kept))
        loaded = tf.saved_model.load(tmp_path)
        model = mgs.FunctionalModel(lambda _, x, loaded=loaded: loaded.call(x), {"w": loaded.w, "v": loaded.v})
        if kept or name != "silu":
            close(mgs.kernel(model, X), expected)
            continue
        with pytest.raises(mgs.UnsupportedModelError, match="`model` must have custom gradients of what their"):
            mgs.kernel(model, X)


def test_an_operation_whose_gradient_is_unknown_is_refused():
    net = Net(lambda self, x: by_override(x[:, 0] @ self.w, "MgsTestUnknown"))
    with pytest.raises(mgs.UnsupportedModelError, match="`model` must know the gradients of its operations; got none of 'Relu'"):
        mgs.kernel(net, X)


FLAT = X[:, 0]


def alone(function, x, variables):
    """The kernel of gradients of one output of one sample each."""
    rows = []
    for a in range(N):
        with tf.GradientTape(persistent=True) as tape:
            heads = tf.unstack(function(x[a : a + 1])[0])
        rows.append([np.concatenate([np.ravel(tape.gradient(head, variable)) for variable in variables]) for head in heads])
    return np.einsum("acp,bcp->ab", rows, rows)


def in_a_branch(x, w, state):
    def assigning():
        state.assign(3.0)
        return tf.tanh(x @ w * state)

    return tf.cond(tf.reduce_sum(x) > -1e9, assigning, lambda: x)


def before_a_branch(x, w, state):
    if tf.reduce_sum(x) > -1e9:
        state.assign(3.0)
    return tf.tanh(x @ w * state)


def in_a_loop(x, w, state):
    for _ in tf.range(STEPS):
        x = tf.tanh(x @ w * state)
        state.assign_add(1.0)
    return x


def in_a_row(x, w, state):
    state.assign(2.0)
    return tf.tanh(x @ w * state)


def of_the_parameter(x, w, state):
    w.assign(0.5 * w)
    return tf.tanh(x @ w)


@pytest.mark.parametrize("function", [in_a_branch, before_a_branch, in_a_loop, in_a_row, of_the_parameter])
def test_what_a_model_assigns_and_reads_is_refused(function):
    w, state = tf.Variable(RANDOM.normal(size=(WIDTH, WIDTH))), tf.Variable(1.0, dtype=tf.float64, trainable=False)
    traced = tf.function(lambda x: function(x, w, state))
    with pytest.raises(mgs.UnsupportedModelError, match="must not read a variable that it has assigned before"):
        mgs.kernel(mgs.FunctionalModel(lambda _, x: traced(x), {"w": w}), FLAT)
    assert state == 1.0


def test_what_a_model_assigns_and_does_not_read_is_left_out():
    w, state, count = tf.Variable(RANDOM.normal(size=(WIDTH, WIDTH))), tf.Variable(2.0, dtype=tf.float64), tf.Variable(0)

    @tf.function
    def model(x):
        count.assign_add(1)
        outputs = tf.tanh(x @ w * state)
        state.assign(state * 1.0)
        return outputs

    found = mgs.kernel(mgs.FunctionalModel(lambda _, x: model(x), {"w": w}), FLAT)
    assert count == 0
    close(found, alone(model, FLAT, [w]))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_over_a_range(compiled):
    w, v = (tf.Variable(RANDOM.normal(size=(WIDTH, WIDTH))) for _ in range(2))

    @tf.function
    def traced(x):
        for _ in tf.range(STEPS):
            x = tf.tanh(x @ w)
        return x @ v

    model = mgs.FunctionalModel(lambda _, x: traced(x), {"w": w, "v": v})
    close(tf.function(lambda x: mgs.kernel(model, x), jit_compile=compiled, autograph=False)(FLAT), alone(traced, FLAT, [w, v]))


def test_a_loop_with_a_variable_of_any_rank():
    w = tf.Variable(RANDOM.normal(size=(WIDTH, WIDTH)))

    def function(x):
        held = tf.convert_to_tensor(w)
        loose = [tf.TensorShape([]), tf.TensorShape(None)]
        _, h = tf.while_loop(
            lambda i, h: i < STEPS,
            lambda i, h: (i + 1, tf.tanh(tf.reshape(h, (-1, WIDTH)) @ held)),
            [0, x],
            shape_invariants=loose,
        )
        return tf.reshape(h, (tf.shape(x)[0], WIDTH))

    close(mgs.kernel(mgs.FunctionalModel(lambda _, x: function(x), {"w": w}), FLAT), alone(function, FLAT, [w]))


def test_calls_keep_no_graphs_of_custom_gradients():
    w = tf.Variable(RANDOM.normal(size=(WIDTH, WIDTH)))
    traced = tf.function(lambda x: tf.nn.silu(x @ w))
    model = mgs.FunctionalModel(lambda _, x: traced(x), {"w": w})

    def graphs():
        gc.collect()
        return sum(type(value).__name__ == "FuncGraph" for value in gc.get_objects())

    mgs.kernel(model, FLAT)
    before = graphs()
    for _ in range(5):
        mgs.kernel(model, FLAT)
    assert graphs() - before < 5
