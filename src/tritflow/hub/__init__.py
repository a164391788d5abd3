"""Giving ternary models away: the model card and the upload behind `tritflow push`."""
