"""Decoding of images and videos, and the evaluation transform. Imports pictures/ and video/."""
