"""Scripts that make data sets, one per source or step. They hand over to the recipes through files."""
