"""The parts of train.py: samples, models, the micro-step, the updates, checkpoints, the monitor."""
