"""What lies at a source: its files, which of them are items, and their classes. Imports entries and dataset."""
