"""Prompts files, graders, accuracy through an OpenAI-compatible endpoint, tables, plots, and pictures of answers."""
