"""polylogit's serving side: one model answer from several vLLM engines."""

__version__ = "0.1.0"

VLLM_VERSION = "0.32.0"
"""The version of vLLM that the adapter was written for and tested with."""
