"""Training data: procedural scenes, photographs, and the latent cache."""
