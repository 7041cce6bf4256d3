"""One module for each type of source, and the table of them. Imports listing, reading and below."""
