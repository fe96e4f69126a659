"""Engines: the optimiser step on one process, under data parallelism, or with DeepSpeed's ZeRO."""
