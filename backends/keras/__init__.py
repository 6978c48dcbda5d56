"""Keras models on whichever backend Keras runs: a model is a pure function of its variables, differentiated by that framework."""

from ._backend import backend as backend
