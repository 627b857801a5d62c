"""The folder of an artifact and its record: how it is made, opened, replaced in part, and reported on."""
