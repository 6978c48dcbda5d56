"""Modules that hold their variables in other ways than TensorFlow's own: all are in the kernel, or it is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from mgs_oracles import close

import mgs_core as mgs

keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework", allow_module_level=True)

RANDOM = np.random.default_rng(0)
X = tf.constant(RANDOM.normal(size=(5, 4)))


def variable(*shape, **options):
    return tf.Variable(RANDOM.normal(size=shape), **options)


def layers():
    body = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(3)], name="body")
    body.set_weights([RANDOM.normal(size=weight.shape) for weight in body.get_weights()])
    return body


class Holder(tf.Module):
    """Holds Keras layers and variables in attributes, lists and dicts, and in modules in turn."""

    def __init__(self):
        super().__init__()
        self.first = [layers()]
        self.inner = tf.Module()
        self.inner.parts = {"second": keras.layers.Dense(3, "tanh", dtype="float64"), "scale": keras.Variable(np.full(3, 0.5))}
        self.inner.parts["second"].build((None, 3))
        self.w = variable(3, 2)

    def __call__(self, x):
        parts = self.inner.parts
        return (self.first[0](x) + parts["second"](self.first[0](x)) * parts["scale"]) @ self.w


def kernel_of(function, variables):
    rows = []
    for a in range(len(X)):
        with tf.GradientTape(persistent=True) as tape:
            outputs = tf.unstack(function(X[a : a + 1])[0])
        found = [tape.gradient(output, variables, unconnected_gradients="zero") for output in outputs]
        rows.append([np.concatenate([np.ravel(tf.convert_to_tensor(part)) for part in parts]) for parts in found])
    return np.einsum("acp,bcp->ab", rows, rows)


@pytest.fixture(autouse=True)
def _double():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


@pytest.mark.parametrize("frozen", [False, True])
def test_keras_layers_of_a_module_are_in_its_kernel(frozen):
    module = Holder()
    module.first[0].layers[0].trainable = not frozen
    second, scale = module.inner.parts["second"], module.inner.parts["scale"]
    trained = [*module.first[0].trainable_variables, *second.trainable_variables, scale]
    assert len(trained) == (5 if frozen else 7)
    found = mgs.kernel(module, X)
    close(found, kernel_of(module, [module.w, *(v.value for v in trained)]))
    report = mgs.check(module, X)
    assert report.ok
    assert sorted(layer.parameter for layer in report.layers) == sorted(["Variable", *(v.path for v in trained)])


def test_a_penalty_reaches_the_keras_layers_of_a_module():
    module, penalty = Holder(), mgs.Penalty("trace", strength=1.0)
    kernel = module.first[0].trainable_variables[0].value

    def value():
        return penalty(mgs.kernel(module, X, differentiable=True))

    with tf.GradientTape() as tape:
        total = value()
    found, step = tape.gradient(total, kernel), RANDOM.normal(size=kernel.shape)
    values = []
    for sign in (1e-5, -1e-5):
        kernel.assign_add(sign * step)
        values.append(float(value()))
        kernel.assign_sub(sign * step)
    np.testing.assert_allclose(float(tf.reduce_sum(found * step)), (values[0] - values[1]) / 2e-5, rtol=1e-6)


class Hidden(tf.Module):
    """Holds variables where TensorFlow does not look."""

    def __init__(self, hidden):
        super().__init__()
        self.w, self.hidden = variable(3, 2), lambda: hidden

    def __call__(self, x):
        hidden = self.hidden()
        return (hidden(x) if callable(hidden) else x @ hidden) @ self.w


def test_a_module_that_reads_what_it_does_not_list_is_refused_by_name():
    for hidden, name in ((variable(4, 3, name="secret"), "secret"), (layers(), "body/dense")):
        with pytest.raises(mgs.ArgumentError, match=f"must hold the variables that it reads in its attributes; got .*{name}"):
            mgs.kernel(Hidden(hidden), X)
    module = Hidden(variable(4, 3, trainable=False))
    close(mgs.kernel(module, X), kernel_of(module, [module.w]))
    module = Hidden(given := variable(4, 3))
    model = mgs.FunctionalModel(lambda _, x: module(x), {"w": module.w, "given": given})
    close(mgs.kernel(model, X), kernel_of(module, [module.w, given]))


def test_what_a_module_says_of_its_trainable_variables_goes():
    class Head(Holder):
        @property
        def trainable_variables(self):
            return (self.w, *self.first[0].trainable_variables)

    module = Head()
    trained = [module.w, *(v.value for v in module.first[0].trainable_variables)]
    close(mgs.kernel(module, X), kernel_of(module, trained))


def test_variables_of_keras_are_no_parameters_of_a_function():
    model = mgs.FunctionalModel(lambda p, x: x @ p["w"], {"w": keras.Variable(np.ones((4, 3)))})
    with pytest.raises(mgs.ArgumentError, match="must be variables or tensors of TensorFlow; got a variable of Keras"):
        mgs.kernel(model, X)


def test_a_layer_that_is_not_built_is_refused():
    module = Holder()
    module.inner.parts["second"] = keras.layers.Dense(3)
    with pytest.raises(mgs.ArgumentError, match="`model` must be built; got Keras layer 'dense"):
        mgs.kernel(module, X)


def test_a_layer_that_is_never_built_but_has_no_variables():
    class Flat(tf.Module):
        def __init__(self):
            super().__init__()
            self.flatten, self.w = keras.layers.Flatten(dtype="float64"), variable(4, 2)

        def __call__(self, x):
            return self.flatten(x) @ self.w

    close(mgs.kernel(Flat(), X), 2.0 * X @ tf.transpose(X))
