"""The parts of `plan.py`: a model without memory, its training step, and ways to spread both over devices."""
