"""Training: one loop for every Method, checkpoints, averages, metrics."""
