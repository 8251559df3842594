"""The bundled model's world: generated scenes of ten objects, the network that names them, its training."""
