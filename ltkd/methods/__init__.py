"""Training methods: losses as pure functions, and the methods that use them by name."""
