"""Pictures and video as they are stored and sent: formats, metadata, colours; containers, frames."""
