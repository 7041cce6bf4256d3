"""An evaluation as tables and as one HTML page. Imports evaluation and below."""
