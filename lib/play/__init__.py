"""The page of play.py: what it asks (asked), the models (studio), one request at a time (turns), HTTP (server), saved
images (saved), and the page itself (page/)."""
