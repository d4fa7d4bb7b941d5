"""Networks and their packages: what turns RGB tiles into nucleus maps."""
