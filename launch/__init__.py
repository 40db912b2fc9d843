"""The commands. They parse, wire rooms together and call; no mathematics here."""
