"""A finished artifact made known: its model card, and its way to the hub; does not measure or change anything."""
