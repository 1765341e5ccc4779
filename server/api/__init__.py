"""The api process: HTTP and text. Token ids go to the coordinator, token ids come back; no torch, no vLLM
here."""
