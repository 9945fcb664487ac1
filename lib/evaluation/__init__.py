"""What inference.py evaluates with: scores, statistics, verdicts, images, pages."""
