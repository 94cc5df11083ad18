"""Looking inside attention: pictures of patterns."""

from saccade.insight.draw import Picture, draw

__all__ = ["Picture", "draw"]
