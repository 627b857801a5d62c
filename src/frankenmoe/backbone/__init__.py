"""What of a parent lies outside its FFNs: merged backbones, and experts that make up for them."""
