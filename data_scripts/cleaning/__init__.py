"""What `clean_corpus` does to documents: filters, duplicates, evaluation sets."""
