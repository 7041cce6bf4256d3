"""What decoding a picture needs: formats, metadata, colour profiles, deep pixels, limits. Imports nothing of ours."""
