"""Results → one self-contained page, a Markdown table, a model card. No model is run here."""
