"""The group of workers that trains a run: its size, its hosts, its failures, and who is slow."""
