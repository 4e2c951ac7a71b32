"""How well a first-order model of the loss predicts what pruning does to it, measured along a pruning run."""
