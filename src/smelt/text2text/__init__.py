"""Benchmarks as text to text: an input, a target, and what a model's answers are worth."""
