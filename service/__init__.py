"""The BentoML service: the library behind HTTP. Importing it imports neither torch nor a model."""
