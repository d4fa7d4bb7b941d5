"""Store the outputs of a teacher for the training images, from which students are distilled."""
