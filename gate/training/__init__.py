"""Training a gate: recorded responses on disk and in memory, DLLG's objective, refinement."""
