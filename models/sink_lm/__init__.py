"""The sink-cache language model (StreamingLLM, Xiao et al., 2023): endless streams, constant memory.

config, rope, llama   the decoder: Llama, Mistral, Qwen2, Qwen3
cache, attention      sink tokens + ring of recent ones, in static slabs
weights, tokenizer    from a Hugging Face folder or a GGUF file
sampling, stops       from logits to the next token; where a text ends
engine                many sessions in one decode batch
"""
