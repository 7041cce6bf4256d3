"""What a pretraining run needs and takes: FLOPs, memory, data, time and cost. Imports training."""
