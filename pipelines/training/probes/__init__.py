"""Probes of the encoder while it trains: kNN accuracy, and RankMe and LiDAR on fixed samples."""
