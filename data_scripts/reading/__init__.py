"""Packages, archives, files and markup: how the text of a source is read."""
