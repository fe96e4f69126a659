"""Grids of runs, and the runner that works through them."""
