"""Training data: raw records → conversations → mixture → collated batches. Nothing here travels with a checkpoint."""
