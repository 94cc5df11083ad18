"""What a mechanism is made of: one formula per class, one file per kind."""
