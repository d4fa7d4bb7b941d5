"""Writers of a run's results in formats for people and other programs; one module per format."""
