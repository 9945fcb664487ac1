"""What train.py trains with: its data, the micro-step, the journal, the checkpoints."""
