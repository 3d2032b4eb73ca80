"""Stock checkpoints as GGUF files, and llama.cpp itself to quantise, run and prove them."""
