"""Ray Serve applications over trained artifacts. Ray's own package is imported as `ray_serve`."""
