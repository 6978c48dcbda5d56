"""The JAX backend: interprets the jaxpr of one sample, so that any pure function is a model."""

from ._backend import backend as backend
