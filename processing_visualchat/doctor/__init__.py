"""Reads a whole mixture before training and reports its problems: `python -m processing_visualchat.doctor`."""
