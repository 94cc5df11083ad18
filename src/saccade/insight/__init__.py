"""Looking inside attention: pictures of patterns, and the cards of systems."""

from saccade.insight.draw import Picture, draw

__all__ = ["Picture", "draw"]
