"""Runs as jobs of a cluster's own scheduler: Ray's jobs, and manifests for KubeRay and Slurm."""
