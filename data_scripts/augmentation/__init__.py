"""Synonyms, back-translation and syntax for `augment`."""
