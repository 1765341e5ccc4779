"""`polylogit top`: a running server in the terminal, from its /metrics alone."""
