"""Chat and text completions: from a validated request to sequences, and from their tokens to OpenAI's shapes."""
