"""timm backbones: making them, loading their weights, and telling which one a model is."""
