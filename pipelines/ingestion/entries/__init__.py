"""Files of a source, chunks of them, and failures to read them. Imports config and runtime."""
