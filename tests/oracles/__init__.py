"""Slow, obvious float64 references written from the method's text, sharing no code with the library."""
