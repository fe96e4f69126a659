"""Sweeps: grids of runs in YAML, their plans, and the executors that work through them."""
