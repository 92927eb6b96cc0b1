"""Run, capture, edit, sweep: everything that happens while the Hugging Face model runs."""
