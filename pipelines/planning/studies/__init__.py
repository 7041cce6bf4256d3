"""What `pipelines.plan_episodes` can compare. Imports what is above it in `pipelines/planning/`."""
