"""Compare two networks on the same pixels of the user's slides: their costs, and where they disagree."""
