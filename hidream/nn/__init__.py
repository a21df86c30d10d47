"""Layers that every model of the family shares."""
