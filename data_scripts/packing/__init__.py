"""From documents to packed tokens: mixture, order, files."""
