"""Actors: what chooses actions. Imports only torch."""
