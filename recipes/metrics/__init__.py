"""Metrics for `evaluate.load("recipes/metrics/<name>.py")` and `recipes.metrics_loader.load_metric("<name>")`.

Every file stands alone: evaluate copies it into its cache before importing it, so it imports by full names. evaluate
also reads the import lines one by one to see what must be installed: no `import a, b`, and no comment behind them.
"""
