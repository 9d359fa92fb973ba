"""The HTTP server: the OpenAI and Anthropic conventions over one engine, and a page to chat on."""
