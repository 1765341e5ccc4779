"""The expert side: one process, one engine, stepped tick by tick. Knows token ids and logits; never text or fusion."""
