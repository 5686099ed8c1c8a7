"""Kubernetes manifests, derived from the labels of an image."""
