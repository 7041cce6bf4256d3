"""What every job needs around its own work: Ray, places and URIs, progress, errors in plain words. Imports config."""
