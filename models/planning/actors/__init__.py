"""Actors: what chooses actions. Imports only pairs."""
