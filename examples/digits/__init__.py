"""The demo of `finetune.py`: a tiny model learns from scratch to chat about scans of handwritten digits."""
