"""Ray Serve applications for trained encoders and language models; imports models, never pipelines.

Ray's own package is imported as `ray_serve`, because `serve` is this one.
"""
