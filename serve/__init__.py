"""Ray Serve applications over trained encoders and language models; imports models, never pipelines.

Ray's own package is imported as `ray_serve`.
"""
