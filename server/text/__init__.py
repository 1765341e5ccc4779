"""Text to token ids and back: tokenizers, chat templates, prompts, detokenising, and what model files say. No HTTP."""
