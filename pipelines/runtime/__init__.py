"""Ray, URIs, places, progress and error messages: what every command needs. Imports config."""
