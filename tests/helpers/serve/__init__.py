"""Helpers of tests of the embeddings server and of what both servers share."""
