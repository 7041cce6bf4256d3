"""What an encoder learned, and what the numbers are worth."""
