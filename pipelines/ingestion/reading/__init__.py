"""Items out of archives and tables, with their labels. Imports the listing."""
