"""What is pruned, when, by which score, and the pruner that attaches it to a training loop."""
