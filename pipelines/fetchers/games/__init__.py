"""Records games as labelled video; may import the folders below pipelines/fetchers."""
