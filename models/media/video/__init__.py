"""Parts of video decoding: containers, frames in order and by number. Imports nothing of ours."""
