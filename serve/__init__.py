"""The serve room: a bundle in, answers that say which group they fell in out. Never imports torch."""
