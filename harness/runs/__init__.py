"""Runs: opened, done, written, and read again."""
