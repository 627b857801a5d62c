"""What of a parent lies outside its FFNs: backbones by merge or measurement, and experts that make up for them."""
