"""Looking inside a model: measuring what it does."""
