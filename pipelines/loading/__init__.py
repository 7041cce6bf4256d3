"""Shards to batches: the plan, read tasks, decoding and the loader. Imports masks, dataset and below."""
