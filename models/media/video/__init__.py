"""What decoding a video needs: containers, frames in order, frames by number. Imports nothing of ours."""
