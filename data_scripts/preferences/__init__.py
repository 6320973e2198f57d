"""Pairs for reward models: where they come from and how they are checked."""
