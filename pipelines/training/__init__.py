"""The training loop and its parts: state, optimizers, schedules, metrics, collapse watch. Imports evaluation, runs, loading and below."""
