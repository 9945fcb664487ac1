"""From a folder of images to a training set: the steps of preprocess.py."""
