"""Random numbers as a function of keys, in numpy and in torch, and the registry of their streams. Imports nothing of ours."""
