"""Hand-written CPU kernels, compiled on the machine that runs them, each with a twin in PyTorch."""
