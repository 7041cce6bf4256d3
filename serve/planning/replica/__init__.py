"""The planner: searches and imaginations in dynamic batches. Imports planning's types."""
