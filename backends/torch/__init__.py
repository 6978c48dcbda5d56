"""The PyTorch backend: reads layer statistics off the autograd graph; neither wraps nor hooks the model."""

from ._backend import backend as backend
