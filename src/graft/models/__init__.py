"""Models: backbones as ordered blocks, heads, weights. Knows nothing of Lightning or Hydra."""
