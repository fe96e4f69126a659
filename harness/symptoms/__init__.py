"""Symptoms: an LLM (or a person) writes what a class looks like; the sets are data with provenance."""
