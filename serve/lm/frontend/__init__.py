"""The language model's routes, in OpenAI's shape, and its way to the replicas. Imports lm's types."""
