"""vipbench: a benchmark harness for adapting CLIP-like models to medical images with prompts."""

__version__ = "0.1.0"
