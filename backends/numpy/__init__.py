"""The NumPy backend: needs no framework, differentiates with autograd."""

from ._backend import backend as backend
