"""HTTP over the engine: the protocols of OpenAI and Anthropic, a chat page that shows the experts, metrics."""
