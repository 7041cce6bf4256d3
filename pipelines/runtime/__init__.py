"""What every job needs around its own work: a Ray, and plain words for what went wrong."""
