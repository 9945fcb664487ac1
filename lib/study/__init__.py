"""The study: its claims, what was measured of each, and its page."""
