"""The code of an engine process: decode images, batch them, run the model and build the answers."""
