"""Stored outputs of a teacher for the training images."""
