"""The sink-cache language model (StreamingLLM, Xiao et al. 2023). Imports nothing else of ours."""
