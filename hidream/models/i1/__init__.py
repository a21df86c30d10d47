"""HiDream-I1 and HiDream-E1: a sparse diffusion transformer over latents."""
