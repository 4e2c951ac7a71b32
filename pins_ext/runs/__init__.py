"""One training run from request to report."""
