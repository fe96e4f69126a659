"""Grids of runs and what runs them."""
