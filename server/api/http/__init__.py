"""HTTP itself: the strict server, middleware, bodies, errors, quotas, CORS, /openapi.json. Not what is asked for."""
