"""The endpoints, one module for each group: what a path does, and what /openapi.json says of it."""
