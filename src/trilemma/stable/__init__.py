"""Stable Diffusion checkpoints: files, texts, pictures."""
