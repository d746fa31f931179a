"""The parts of `serve.py`: an engine that answers conversations in batches, and OpenAI's API in front of it."""
