"""Helpers of tests of pipelines: sources, shards, runs without Ray."""
