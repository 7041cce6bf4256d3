"""The parts of hud.py: footage, encoders, probes, supervised networks, rows, table and plot."""
