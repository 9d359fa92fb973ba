"""Training on several processes: ranks, experts and weights divided among them, checkpoints for any number of them."""
