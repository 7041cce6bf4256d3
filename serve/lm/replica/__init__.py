"""The language model's replica: one engine thread, its sessions and generations. Imports store."""
