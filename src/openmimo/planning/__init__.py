"""What a model will cost on given devices, by formula: memory, limits of speed, layouts."""
