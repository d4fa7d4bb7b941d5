"""Networks and model packages, which turn RGB tiles into nucleus maps."""
