"""Helpers shared by several tests, in one folder per package under test; holds no tests."""
