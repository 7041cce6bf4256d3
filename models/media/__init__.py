"""Encoded images and videos to pixels, and the evaluation transform. Imports its own pictures/ and video/."""
