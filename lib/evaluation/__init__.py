"""What inference.py evaluates with: scores, statistics, verdicts, pictures, pages."""
