"""Live streams over a WebSocket: messages, the bounded frame queue, the rolling window. Imports media."""
