"""Running models: sessions, calibration, evaluation, tokens and feeds. Never solves a weight, never edits a model."""
