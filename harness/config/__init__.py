"""Configs: what a run is, in plain typed sections."""
