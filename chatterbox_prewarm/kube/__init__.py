"""Kubernetes manifests, derived from what an image says of its warm states; and the kubelet's rules for probes."""
