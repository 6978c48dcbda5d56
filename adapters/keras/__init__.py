"""Keras 3: regularise by the kernel in `fit`, and watch it, on TensorFlow, JAX and PyTorch.

    model = regularize(model, MGSRegularizer("trace"))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, callbacks=[MGSMonitor(probe_x, probe_y)])

`mgs_core.kernel(model, x, y)` and `mgs_core.check(model, x)` take Keras models as they are.
"""

from ._keras import keras as _keras
from ._losses import sample_loss as sample_loss
from ._models import MGSFunctional as MGSFunctional
from ._models import MGSMixin as MGSMixin
from ._models import MGSSequential as MGSSequential
from ._models import attach as attach
from ._models import regularize as regularize
from ._monitor import MGSMonitor as MGSMonitor
from ._monitor import StrengthSchedule as StrengthSchedule
from ._regularizer import MGSRegularizer as MGSRegularizer

__all__ = [
    "MGSFunctional",
    "MGSMixin",
    "MGSMonitor",
    "MGSRegularizer",
    "MGSSequential",
    "StrengthSchedule",
    "attach",
    "regularize",
    "sample_loss",
]
del _keras
