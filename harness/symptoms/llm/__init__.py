"""LLM servers: started, asked, and every answer recorded."""
