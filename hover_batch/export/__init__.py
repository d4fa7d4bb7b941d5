"""What a run leaves for people and other programs to look at; one file per format."""
