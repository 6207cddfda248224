"""The HTTP layer below the routes: connections, middleware, request bodies, API keys and the shared service state."""
