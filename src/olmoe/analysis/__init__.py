"""Looking inside: what a model does, measured."""
