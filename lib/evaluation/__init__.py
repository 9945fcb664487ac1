"""Measuring what an adapter learned and spoiled."""
