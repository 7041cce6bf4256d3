"""Episodes of agents, and what a world model's imagination is worth. Imports `models.planning`."""
