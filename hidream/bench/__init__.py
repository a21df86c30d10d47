"""Timings: our way of drawing against two others, with the same weights, in one run."""
