"""Own kernels in C++ for 4- and 8-bit weights, built when first needed. Imports torch only."""
