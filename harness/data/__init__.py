"""Images in: sources -> shards and index -> reader."""
