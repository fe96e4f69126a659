"""Frozen CLIP-like models as two towers behind one adapter."""
