"""What is measured: the scores of an image and of a run."""
