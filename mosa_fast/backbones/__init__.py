"""timm backbones: making them, loading their weights, putting adapters in."""
