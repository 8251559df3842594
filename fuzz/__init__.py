"""Coverage-guided fuzzing of what reads callers' bytes (docs/fuzzing.md). Not part of the package or the service."""
