"""Helpers of tests of the language model: tiny models, engines, servers."""
