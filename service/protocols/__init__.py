"""Other people's protocols over the same pipeline: Open Inference (V2) over HTTP and gRPC, and V1."""
