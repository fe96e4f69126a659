"""Datasets: sources of images -> shards and index -> reader -> views."""
