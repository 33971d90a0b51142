"""Putting adapters into timm models, and taking them out."""
