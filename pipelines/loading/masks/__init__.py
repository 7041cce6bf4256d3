"""Masks as pure functions of sample keys: blocks, tubes and single patches. Imports config."""
