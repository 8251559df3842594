"""Tests of the library against the slow, obvious oracles."""
