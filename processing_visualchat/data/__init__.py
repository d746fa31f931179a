"""Training data: raw records → conversations → mixture → collated batches. Nothing here travels with a checkpoint."""

# Part of every cache key: raise it when the same files yield different rows.
DATA_VERSION = 1
