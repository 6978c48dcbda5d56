"""The taxonomy of refusals.

Every error of this library derives from `MgsError` and says which argument is wrong, what was got and the remedy. Four kinds:

* `ArgumentError`: the call is wrong; change the argument.
* `BackendError`: the backend is unknown or its framework is not installed; install the extra.
* `SamplesInteractError`: never supportable; per-sample gradients do not exist for this model.
* `UnsupportedModelError`: not supported (yet); the message names the layer and what to use instead.
"""

from __future__ import annotations


class MgsError(Exception):
    """Be the base class of every error that this library raises on purpose."""


class ArgumentError(MgsError, ValueError):
    """Report an argument that has the wrong type, shape, range or content."""


class BackendError(MgsError, ImportError):
    """Report a backend that is unknown or whose framework is not installed."""


class SamplesInteractError(MgsError, ValueError):
    """Report that one sample's output depends on another sample, so that per-sample gradients do not exist."""


class UnsupportedModelError(MgsError, NotImplementedError):
    """Report a model, layer or operation that this library cannot treat exactly."""
