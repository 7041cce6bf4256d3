"""World models and what plans with them. Imports `models.encoders` and `models.objectives`."""
