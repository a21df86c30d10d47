"""Sets of pictures on disk: what they are made from, and how they are read in training."""
