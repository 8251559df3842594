"""Manifests for Kubernetes, rendered by Kustomize; the only program here makes one of them."""
