"""The objectives as pure functions of tensors, one file per algorithm."""
