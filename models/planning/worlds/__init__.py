"""Worlds that are simulated here. Imports only torch."""
