"""The language model's routes and how they answer a request. Imports lm's types and models."""
