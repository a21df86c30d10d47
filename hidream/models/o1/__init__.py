"""HiDream-O1-Image: one transformer over text, reference pictures and noisy pixel patches."""
