"""Raw images and videos to staged and merged shards, file by file or from a live stream. Imports its subfolders and dataset."""
