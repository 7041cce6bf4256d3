"""What an encoder learned: features, probes, baselines, ranks, and what the numbers are worth. Imports loading and below."""
