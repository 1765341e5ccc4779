"""HTTP itself: the strict server, middleware, bodies, faults, quotas, CORS, /openapi.json. Knows no completion."""
