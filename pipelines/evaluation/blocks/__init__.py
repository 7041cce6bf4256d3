"""Which block of an encoder to probe; uses `pipelines.evaluation` and its `probes`."""
