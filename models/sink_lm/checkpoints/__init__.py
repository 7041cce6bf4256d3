"""Language models on disk: Hugging Face folders, hub ids, GGUF files, tokenizers. Imports network."""
