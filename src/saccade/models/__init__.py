"""Recipes: functions that return a configured model, its data and its training run."""
