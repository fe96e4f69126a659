"""Benchmarks of one GPU, each in a process of its own and bounded in time; `python -m benchmarks.gpu`."""
