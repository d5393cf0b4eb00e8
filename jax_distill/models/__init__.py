"""Networks: transformer, text encoders, autoencoder."""
