"""World models: perception and what actions do to it, trained as objectives. Imports
`models.encoders` and `models.objectives`."""
