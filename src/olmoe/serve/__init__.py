"""HTTP over the engine: the protocols of OpenAI and Anthropic, metrics, and a chat page that shows the experts."""
