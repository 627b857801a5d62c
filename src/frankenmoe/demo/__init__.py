"""The demo: every stage, on small parents that it trains itself."""
