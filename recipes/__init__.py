"""Training and evaluation stages, and the parts they share."""
