"""Language models on disk: folders, hub ids, GGUF files, tokenizers. Imports network."""
