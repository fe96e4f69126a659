"""From logits to metrics."""
