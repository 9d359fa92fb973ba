"""Reinforcement learning on verifiable problems."""
