"""Structured output: tool calls in a growing text, and the grammars that force them and JSON schemas."""
