"""Evaluation: predictions of a split, and the metrics that derive from them."""
