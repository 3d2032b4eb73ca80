"""A study of compression: methods side by side on the same fine-tuned models, groups and budget."""
