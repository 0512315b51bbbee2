"""Training CLIP-style models on a preemptible SLURM cluster, from one recipe."""
