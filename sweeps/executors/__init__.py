"""Executors: ways to run the units of a sweep, on this machine, over an allocation, or as jobs of a cluster."""
