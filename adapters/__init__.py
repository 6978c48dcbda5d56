"""Adapters: what users touch in their training loop, one module for each framework."""
