"""The embedded benchmark: drawn lesions and a small CLIP that was trained on visual words and no medical ones."""
