"""What several runs, or one run watched closely, show: ablations and diagnosis."""
