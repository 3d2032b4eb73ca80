"""smelt: mixture-of-experts language models, made small."""
