"""What a run's predictor expects, drawn and measured. Imports the evaluation's features."""
