"""The decoder network and its sink cache: Llama, Mistral, Qwen2, Qwen3. Imports torch only."""
