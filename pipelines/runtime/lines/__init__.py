"""Lines of a running job on the terminal: progress, what it waits for, and nothing else."""
