"""``vq-grid``: a small 2D grid autoencoder."""
