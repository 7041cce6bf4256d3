"""Items out of archives and tables, with their labels. Imports listing and below."""
