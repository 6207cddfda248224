"""The code of an engine process: it decodes images, batches them, runs the model and builds the answers."""
