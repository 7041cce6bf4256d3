"""Turns files and live streams into staged and merged shards. Imports its folders and dataset."""
