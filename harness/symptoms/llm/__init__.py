"""LLM servers: start them, send them requests, and record every answer."""
