"""From a model's configuration to its attention layers."""
