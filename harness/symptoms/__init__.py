"""Symptom sets: phrases by an LLM or a person for the appearance of each class, as data with provenance."""
