"""What a trained predictor expects: as pictures, and as surprise. Imports objectives and below."""
