"""Random numbers as functions of keys, and the registry of streams. Imports nothing of ours."""
