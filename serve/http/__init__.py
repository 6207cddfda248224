"""HTTP below the routes: connections, middleware, request bodies, API keys."""
