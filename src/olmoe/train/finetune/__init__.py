"""Fine-tuning: chats instead of running text, which of their tokens are trained, adapters, preferences."""
