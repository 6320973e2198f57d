"""Rows of fine-tuning sets: sources, settings, rules."""
