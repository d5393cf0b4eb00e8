"""Few-step distillation of FLUX-family text-to-image models in JAX."""
