"""One image or video as it will be stored: validated, cut, encoded. Imports reading and below."""
