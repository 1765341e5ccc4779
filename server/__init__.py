"""polylogit's serving side: one model answer from several vLLM engines."""

__version__ = "0.1.0"
