"""Helpers of tests of models: pictures, videos, hyperoptimizers."""
