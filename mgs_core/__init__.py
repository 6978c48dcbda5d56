"""Model Gradient Similarity: watch, explain and regularise learning by the kernel of per-sample model gradients."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mgs_core import _checkout
from mgs_core._errors import ArgumentError as ArgumentError
from mgs_core._errors import BackendError as BackendError
from mgs_core._errors import MgsError as MgsError
from mgs_core._errors import SamplesInteractError as SamplesInteractError
from mgs_core._errors import UnsupportedModelError as UnsupportedModelError
from mgs_core._registry import available_backends as available_backends
from mgs_core._registry import get_backend as get_backend
from mgs_core.agreement import agreement as agreement
from mgs_core.agreement import agreement_weights as agreement_weights
from mgs_core.check import check as check
from mgs_core.functional import FunctionalModel as FunctionalModel
from mgs_core.heads import cross_entropy as cross_entropy
from mgs_core.kernel import kernel as kernel
from mgs_core.kernel import kernel_blocks as kernel_blocks
from mgs_core.monitor import CallbackSink as CallbackSink
from mgs_core.monitor import JSONLinesSink as JSONLinesSink
from mgs_core.monitor import Recorder as Recorder
from mgs_core.monitor import Schedule as Schedule
from mgs_core.monitor import tracker_sink as tracker_sink
from mgs_core.penalty import Penalty as Penalty
from mgs_core.summary import Summary as Summary
from mgs_core.summary import summarize as summarize
from mgs_core.suspicion import Suspicion as Suspicion
from mgs_core.suspicion import suspicion as suspicion

if TYPE_CHECKING:
    from mgs_core import onnx as onnx
    from mgs_core.experiments.audit import Audit as Audit
    from mgs_core.experiments.audit import audit as audit

_checkout.complete()

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "CallbackSink",
    "FunctionalModel",
    "JSONLinesSink",
    "MgsError",
    "Penalty",
    "Recorder",
    "SamplesInteractError",
    "Schedule",
    "Summary",
    "Suspicion",
    "UnsupportedModelError",
    "agreement",
    "agreement_weights",
    "available_backends",
    "check",
    "cross_entropy",
    "get_backend",
    "kernel",
    "kernel_blocks",
    "summarize",
    "suspicion",
    "tracker_sink",
]


#: Loaded on first use, for they need the packages of the extras.
_LATER = ("Audit", "audit", "onnx")


def __dir__() -> list[str]:
    try:
        later = _LATER if find_spec("onnx") else ()
    except ValueError:  # of a module that was made by hand
        later = ()
    return sorted({*globals(), *later})


if not TYPE_CHECKING:  # to a type checker it would mean that every name exists

    def __getattr__(name: str) -> Any:
        if name == "onnx":
            return importlib.import_module("mgs_core.onnx")
        if name in ("audit", "Audit"):
            return getattr(importlib.import_module("mgs_core.experiments.audit"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
