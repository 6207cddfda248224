"""The server's side of its engine processes: models and versions, dispatching, restarts, admission."""
