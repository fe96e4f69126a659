"""The embedded benchmark: drawn lesions and a small CLIP that knows visual words and no medical ones."""
