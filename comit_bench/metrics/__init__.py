"""Numbers from arrays: similarity, Frechet distance, overlap, perceptual distance."""
