"""Commands beside serving: the benchmark, evaluation, and a monitor in the terminal."""
