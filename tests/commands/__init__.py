"""Tests of verbs that belong to no other part."""
