"""Post-training: rollouts, outcome rewards, teachers, routing replay, and the losses of equations 5-9."""
