"""Every job's configuration: frozen keyword-only dataclasses and their JSON. Imports nothing but
the standard library."""
