"""Two networks over the same pixels of the user's own slides: what they cost, and where they disagree."""
