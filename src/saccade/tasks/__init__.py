"""Generators and small real data, each with its metric and its chance level."""
