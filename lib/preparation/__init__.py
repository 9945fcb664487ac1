"""From a folder of images to a training set: what preprocess.py does its work with."""
