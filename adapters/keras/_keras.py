"""Import Keras, and say what to install where it is missing or too old."""

from __future__ import annotations

import importlib.util

from mgs_core import BackendError

try:
    import keras as keras
except ImportError as error:
    if importlib.util.find_spec("keras") is not None:
        raise  # Keras says itself what its own backend lacks
    found = "keras-core, which became Keras 3" if importlib.util.find_spec("keras_core") is not None else "none"
    raise BackendError(
        f'`keras` must be Keras 3.13 or later; got {found}. Run: pip install "keras>=3.13", and import keras, not keras_core.'
    ) from error

if tuple(int(part) for part in keras.__version__.split(".")[:2]) < (3, 13):
    raise BackendError(f'`keras` must be Keras 3.13 or later; got {keras.__version__}. Run: pip install "keras>=3.13".')
