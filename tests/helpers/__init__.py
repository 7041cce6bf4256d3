"""What several tests share, by the package they test; no test stands here."""
