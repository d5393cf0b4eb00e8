"""Training data: embedded worlds of captioned pictures."""
