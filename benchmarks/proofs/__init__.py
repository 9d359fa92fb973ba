"""What `engine_proofs.py` runs, one file per proof."""
