"""Parts of image decoding: formats, metadata, colours, deep pixels. Imports nothing of ours."""
