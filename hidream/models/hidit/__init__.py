"""Hi-DiT: a diffusion transformer whose last steps also see pixels."""
