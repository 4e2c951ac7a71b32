"""Self-regularization by an earlier state of the model: teacher, loss of every head, gradient of the task alone."""
