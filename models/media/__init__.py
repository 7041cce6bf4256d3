"""Video as it is stored and sent: containers, frames in order and by number."""
