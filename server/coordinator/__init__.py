"""The coordinator: steps every engine in lockstep, fuses their rows, samples, feeds the token back. Knows token ids and
distributions; never text, HTTP or an engine."""
