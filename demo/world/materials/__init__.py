"""What surfaces are made of: colours and finishes, what is painted on them, the holographic film."""
