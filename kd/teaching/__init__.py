"""Maps of the teacher for training images."""
