"""Backends: turn a model and a batch into layer statistics, one folder for each framework."""
