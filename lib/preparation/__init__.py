"""From a folder of pictures to a training set: what preprocess.py does its work with."""
