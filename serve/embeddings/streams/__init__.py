"""Live streams over a WebSocket: messages, queues and windows of frames. Imports media."""
